"""Opening models: a folder with an adapter is its base with the change in it, ready to learn on."""

import torch
from tiny import tiny_model, tiny_tokenizer

from retain.methods.context import Run
from retain.methods.lora import LoRA
from retain.models import params
from retain.models.load import load_model


def test_an_adapter_is_merged_and_what_comes_out_can_learn(tiny_folder, tmp_path):
    model = LoRA(r=2).prepare_model(load_model(str(tiny_folder))[0], Run(directory=None))
    for pair in params.lora_pairs(model).values():
        torch.nn.init.normal_(pair.B)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    ids = torch.arange(9)[None]
    found, _ = load_model(str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, model.eval()(ids).logits, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(found(ids).logits, tiny_model(tiny_tokenizer())(ids).logits, atol=0.1)
    assert not hasattr(found, "peft_config")
    assert all(p.requires_grad for p in found.parameters())
