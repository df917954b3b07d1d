"""The dynamic loss scale of fp16 goes on where it stood."""

from types import SimpleNamespace

from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from neox_hf.checkpoint import CheckpointWriter, open_checkpoint
from neox_hf.training import loss_scale


def scaler() -> DynamicLossScaler:
    return DynamicLossScaler(2.0**16, 4, 1, 2, consecutive_hysteresis=False)


def saved(folder, optimizer):
    writer = CheckpointWriter(folder, 1)
    loss_scale.write(writer, optimizer)
    return open_checkpoint(writer.commit())


def test_it_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)
    overflows = [False, True, True, False, False, True, False, False, False, False, False, False, True, True, False]
    whole, first, second = scaler(), scaler(), scaler()
    for overflow in overflows:
        whole.update_scale(overflow)
    for overflow in overflows[:8]:
        first.update_scale(overflow)
    loss_scale.load(saved(tmp_path, SimpleNamespace(loss_scaler=first)), SimpleNamespace(loss_scaler=second))
    for overflow in overflows[8:]:
        second.update_scale(overflow)
    assert vars(second) == vars(whole)
    assert whole.cur_scale != 2.0**16


def test_without_a_dynamic_scale_nothing_is_written(tmp_path):
    checkpoint = saved(tmp_path, SimpleNamespace(loss_scaler=LossScaler(1)))
    assert not checkpoint.has(loss_scale.FILE)
    fresh = scaler()
    loss_scale.load(checkpoint, SimpleNamespace(loss_scaler=fresh))
    assert fresh.cur_scale == 2.0**16
    loss_scale.load(checkpoint, SimpleNamespace())
