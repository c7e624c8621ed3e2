"""The table of switching, on a tiny model."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import experts_switching


def test_every_kind_of_change_is_measured(tiny_folder, tmp_path, capsys):
    out = tmp_path / "found.json"
    code = experts_switching.main(["--model", str(tiny_folder), "--repeats", "20", "--rank", "2", "--out", str(out)])
    found = json.loads(out.read_text())
    shown = capsys.readouterr().out
    # float32, two layers, rank 2, on q, k, v, o, gate, up and down
    ins_and_outs = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert found["bytes"] == 4 * 2 * 2 * sum(map(sum, ins_and_outs))
    assert found["switch"] < found["load_expert"] < 60
    assert found["ratio"] == found["reload_model"] / found["switch"]
    assert code == int(found["switch"] > 0.005 or found["ratio"] < 500)
    assert experts_switching.table(found) in shown


def test_mixed_batches_are_timed_by_both_ways(tiny_folder, tmp_path, capsys):
    import mixed_batches

    out = tmp_path / "mixed.json"
    same = [
        "--model",
        str(tiny_folder),
        "--rounds",
        "1",
        "--steps",
        "2",
        "--rank",
        "2",
        "--experts",
        "2",
        "--rows",
        "4",
    ]
    mixed_batches.main([*same, "--prompt", "4", "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found) == ["retain", "PEFT adapter_names"]
    for numbers in found.values():
        assert numbers["lowest"] == numbers["ratio"] == numbers["highest"] > 0
        assert numbers["one"] > 0
    assert capsys.readouterr().out.strip() == mixed_batches.table(found)


def test_both_ways_say_the_same(tiny_folder, tmp_path):
    """Else the times would be of different things."""
    import mixed_batches
    import torch

    library = mixed_batches.make_library(str(tiny_folder), tmp_path, 2, 2)
    model, _ = mixed_batches.load_model(str(tiny_folder), tokenizer=False)
    pool = mixed_batches.AdapterPool(model.eval(), library)
    pool.ensure(library.names())
    ids, names = torch.randint(3, 300, (4, 6)), ["expert0", None, "expert1", "expert0"]
    with torch.no_grad():
        with pool.rows(names):
            ours = pool.model(ids).logits
        with mixed_batches.by_peft(pool)(names):
            theirs = pool.model(ids).logits
        plain = pool.model(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain[1], ours[1])
    assert not torch.allclose(plain[0], ours[0])
