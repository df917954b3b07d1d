"""Stop signals where a run is not alone in its process: in another thread, and while a callback evaluates."""

import os
import signal
import threading

import pytest
import torch
from transformers import TrainerCallback, default_data_collator

from neox_hf.training.signals import STOP_SIGNALS, StopRequest
from tests.runs import write_corpus
from tests.training.test_evaluation import VOCAB, make_trainer, steps_saved


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("signals") / "corpus.jsonl")


def in_a_thread(function):
    """What `function` returns in a thread of its own, or the error that it raises."""
    found = []

    def run():
        try:
            found.append(function())
        except BaseException as error:  # noqa: BLE001 - the test tells of it
            found.append(error)

    thread = threading.Thread(target=run, name="a-second-one")
    thread.start()
    thread.join()
    return found[0]


def test_the_main_thread_listens():
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    with StopRequest(1) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agree() == signal.SIGUSR1
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


def test_training_in_a_thread(tmp_path, corpus, caplog):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    trainer = make_trainer(tmp_path, corpus, max_steps=2)
    assert in_a_thread(trainer.train).global_step == 2
    assert steps_saved(tmp_path) == [2]
    assert trainer.stop_signal == 0
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
    assert "the thread a-second-one, and only the main thread hears signals" in caplog.text


class Asks(TrainerCallback):
    """Evaluates once, on an event of step 2; SIGTERM comes first."""

    def __init__(self, how: str, event: str) -> None:
        self.how, self.event = how, event
        self.trainer, self.asked, self.found = None, False, None

    def on_step_end(self, args, state, control, **kwargs):
        self.ask("on_step_end", state.global_step)

    def on_evaluate(self, args, state, control, **kwargs):
        self.ask("on_evaluate", state.global_step)

    def ask(self, event: str, step: int) -> None:
        if self.asked or event != self.event or step != 2:
            return
        self.asked = True
        os.kill(os.getpid(), signal.SIGTERM)
        if self.how == "evaluate":
            self.found = self.trainer.evaluate()["eval_loss"]
        else:
            row = torch.arange(32) % VOCAB
            self.trainer.data_collator = default_data_collator
            self.found = self.trainer.predict([{"input_ids": row, "labels": row}] * 4).metrics["test_loss"]


def stopped(folder, corpus, asks, **given):
    """The steps that a run saves which is stopped as `asks` evaluates."""
    trainer = make_trainer(folder, corpus, callbacks=[asks], save_steps=100, **given)
    asks.trainer = trainer
    trainer.train()
    assert asks.asked
    assert trainer.stop_signal == signal.SIGTERM
    return steps_saved(folder)


@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_what_a_callback_asks_for_runs_to_its_end(tmp_path, corpus, how):
    asks = Asks(how, "on_step_end")
    assert stopped(tmp_path, corpus, asks) == [2]
    assert asks.found > 0


@pytest.mark.parametrize("how", ["evaluate", "predict"])
def test_but_not_within_the_run_s_own_evaluation(tmp_path, corpus, how):
    asks = Asks(how, "on_evaluate")
    assert stopped(tmp_path, corpus, asks, eval_strategy="steps", eval_steps=2) == [2]
    assert asks.found is None
