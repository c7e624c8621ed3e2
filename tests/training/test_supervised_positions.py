"""On a CPU the head scores supervised positions only, with the loss and the gradients of scoring them all."""

import torch
from tiny import tiny_model, tiny_tokenizer
from training_kit import rows, trainer
from trl import SFTTrainer
from trl.trainer import utils as trl_utils


def step(made, compute_loss):
    """(loss, gradients, rows that went through the head) of one batch."""
    seen = []
    function = trl_utils._ChunkedLogProbFunction
    apply = function.apply

    def counted(hidden, *rest):
        seen.append(len(hidden))
        return apply(hidden, *rest)

    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    made.model.zero_grad()
    function.apply = counted
    try:
        loss = compute_loss(made, made.model, dict(batch), num_items_in_batch=torch.tensor(11))
        loss.backward()
    finally:
        function.apply = apply
    gradients = {n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, seen, batch["labels"]


def test_loss_and_gradients_are_those_of_all_positions(tmp_path):
    made = trainer([], tmp_path, tiny_model(tiny_tokenizer()).double(), train_rows=rows(16))
    made.model.train()
    everything, all_gradients, all_rows, labels = step(made, SFTTrainer.compute_loss)
    loss, gradients, scored, same = step(made, type(made).compute_loss)
    assert torch.equal(labels, same)
    assert scored == [int((labels[:, 1:] != -100).sum())]
    assert all_rows == [labels[:, 1:].numel()]
    assert scored[0] < all_rows[0] / 2
    torch.testing.assert_close(loss, everything)
    assert gradients.keys() == all_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, all_gradients[name], msg=name)


def test_the_host_is_left_as_it_was(tmp_path):
    before = trl_utils._use_triton
    made = trainer([], tmp_path, tiny_model(tiny_tokenizer()))
    made.train()
    assert trl_utils._use_triton is before
