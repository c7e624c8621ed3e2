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
