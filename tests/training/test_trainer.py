"""The stopping rule in a real Trainer, on a model whose optimum is known."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from haltwise import InputError
from haltwise.training import Returns, StoppingConfig
from haltwise.training.averaging import BestWeights
from haltwise.training.trainer import StoppingCallback

OPTIMUM = 3.0
POINTS = StoppingConfig(level=None, least_gain=1e-3, patience=2)


class Pull(nn.Module):
    """One weight, whose loss is the square of its distance to what the data say: 3 in the mean."""

    main_input_name = "x"

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.weight - labels) ** 2).mean(), "logits": self.weight.expand(len(x))}


def rows(noise: float = 0.0) -> list[dict[str, Any]]:
    ways = (-1, 1)
    return [{"x": [0.0], "labels": OPTIMUM + noise * ways[n % 2]} for n in range(64)]


def returns_of(model: nn.Module) -> Returns:
    """Of 20 questions, which pull up and down around the optimum."""
    (weight,) = model.parameters()
    return -((weight.item() - OPTIMUM - np.linspace(-0.1, 0.1, 20)) ** 2)


def trained(
    folder: Path, callback: StoppingCallback, resume: str | None = None, **settings: Any
) -> Trainer:
    torch.manual_seed(0)
    usual: dict[str, Any] = {
        "max_steps": 300, "learning_rate": 0.02, "lr_scheduler_type": "constant", "optim": "sgd",
        "eval_strategy": "steps", "eval_steps": 10, "save_strategy": "no", "report_to": [],
        "per_device_train_batch_size": 4, "disable_tqdm": True, "use_cpu": True,
        "max_grad_norm": 0.0,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **usual | settings)
    trainer = Trainer(
        Pull(), arguments, train_dataset=rows(), eval_dataset=rows(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weight_of(trainer: Trainer) -> float:
    assert isinstance(trainer.model, Pull)
    return trainer.model.weight.item()


def told_by(trainer: Trainer) -> list[str]:
    history: list[Any] = trainer.state.log_history
    return [entry["stopping_rule"] for entry in history if "stopping_rule" in entry]


def test_it_stops_at_the_optimum_by_the_interval(tmp_path: Path) -> None:
    config = StoppingConfig(least_gain=0.01, interval="normal", span=20.0)
    trainer = trained(tmp_path, StoppingCallback(config, returns_of))
    # Of gradient 2 (w - 3) and rate 0.02: each step leaves 0.96 of the distance.
    assert weight_of(trainer) == pytest.approx(3 - 3 * 0.96**trainer.state.global_step, abs=1e-3)
    assert abs(weight_of(trainer) - OPTIMUM) < 0.1 and trainer.state.global_step < 150
    (told,) = told_by(trainer)
    assert told.startswith("stop: at step") and "the return has gained at most" in told


def test_it_goes_by_the_metric_of_the_trainer_where_there_is_no_other(tmp_path: Path) -> None:
    trainer = trained(tmp_path, StoppingCallback(POINTS), metric_for_best_model="loss")
    assert abs(weight_of(trainer) - OPTIMUM) < 0.1 and trainer.state.global_step < 200
    before = trainer.state.global_step
    trainer.evaluate()  # after the training, which it does not disturb
    assert trainer.state.global_step == before


def test_the_schedule_of_the_trainer_does_not_undo_a_lower_rate(tmp_path: Path) -> None:
    # No gain is ever enough: it reduces at steps 10 and 20, cools down at 30, and stops at 35.
    config = StoppingConfig(
        level=None, least_gain=100.0, patience=1, reductions=2, factor=0.5, cooldown_steps=5
    )
    trainer = trained(
        tmp_path, StoppingCallback(config, returns_of), lr_scheduler_type="linear",
        eval_on_start=True, learning_rate=0.3, max_steps=100,
    )  # fmt: skip
    assert trainer.state.global_step == 35
    assert [told.split(":")[0] for told in told_by(trainer)] == [
        "reduce",
        "reduce",
        "cool down",
        "stop",
    ]
    factors = [1.0] * 10 + [0.5] * 10 + [0.25] * 10 + [0.025] * 5
    left = math.prod(1 - 2 * 0.3 * (1 - n / 100) * factor for n, factor in enumerate(factors))
    assert weight_of(trainer) == pytest.approx(3 - 3 * left, abs=1e-4)
    assert trainer.optimizer is not None
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * 0.65)


def test_a_plateau_raises_the_batch_from_the_next_epoch_on(tmp_path: Path) -> None:
    config = StoppingConfig(
        level=None, least_gain=100.0, patience=1, reductions=1, reduce="noise", most_steps=26
    )
    callback = StoppingCallback(config, returns_of)
    # 16 batches an epoch; at step 10 batches become twice as large: 16 + 8 steps are 2 epochs.
    trainer = trained(
        tmp_path, callback, eval_on_start=True, eval_steps=10, max_steps=60, num_train_epochs=9
    )
    epochs = {
        entry["step"]: entry["epoch"] for entry in trainer.state.log_history if "epoch" in entry
    }
    assert callback.rule.batch == 2 and epochs[20] == pytest.approx(1 + 4 / 8)
    assert trainer.args.gradient_accumulation_steps == 1


def test_the_best_weights_or_their_average_are_kept(tmp_path: Path) -> None:
    """At a rate of 1 the weight jumps from 0 to 6 and back, around its optimum."""
    config = StoppingConfig(level=None, patience=None, most_steps=4)
    best = BestWeights(4)
    trainer = trained(
        tmp_path, StoppingCallback(config, returns_of, best), eval_steps=1, learning_rate=1.0
    )
    assert weight_of(trainer) == pytest.approx(OPTIMUM)
    assert best.means == pytest.approx([best.means[0]] * 4)


@pytest.mark.whole
def test_it_stops_for_a_budget_or_a_vanished_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = StoppingConfig(patience=None, gradient_floor=0.5, gradient_steps=3)
    trainer = trained(tmp_path / "a", StoppingCallback(config, returns_of))
    # The gradient is 6 x 0.96^n at step n + 1, and below 0.5 from n = 61 on: 62, 63, 64.
    assert trainer.state.global_step == math.ceil(math.log(0.5 / 6) / math.log(0.96)) + 3
    budget = StoppingConfig(patience=None, dollar_budget=1e-4, tariff=2.0)
    trainer = trained(tmp_path / "b", StoppingCallback(budget), include_num_input_tokens_seen="all")
    # Of main_input_name, 4 numbers a step: 50 tokens are used up at step 13.
    assert trainer.state.global_step == 13
    monkeypatch.delattr(Pull, "main_input_name")
    with pytest.raises(InputError, match="the Trainer counts no tokens of Pull"):
        trained(
            tmp_path / "c", StoppingCallback(budget, returns_of),
            include_num_input_tokens_seen="all",
        )  # fmt: skip


@pytest.mark.whole
def test_a_training_that_goes_on_from_a_checkpoint_stops_where_it_would(tmp_path: Path) -> None:
    config = StoppingConfig(least_gain=0.01, interval="normal", span=20.0, reductions=1)
    whole, first, second = (StoppingCallback(config, returns_of) for _ in range(3))
    stop = trained(tmp_path / "whole", whole).state.global_step
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 10}
    trained(tmp_path / "part", first, max_steps=stop - 15, **saving)
    last = str(tmp_path / f"part/checkpoint-{stop - 20}")
    assert trained(tmp_path / "part", second, last, **saving).state.global_step == stop
    assert second.rule.state() == whole.rule.state()


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (StoppingConfig(), {"eval_strategy": "no"}, "eval_strategy is no"),
        (StoppingConfig(token_budget=9), {}, "include_num_input_tokens_seen is no"),
        (POINTS, {"restore_callback_states_from_checkpoint": True}, "which makes callbacks anew"),
    ],
)
def test_settings_of_the_trainer_that_do_not_fit_are_refused(
    config: StoppingConfig, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        trained(tmp_path, StoppingCallback(config, returns_of), **settings)


def test_deepspeed_whose_steps_it_cannot_slow_is_refused(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path), eval_strategy="steps", eval_steps=5, report_to=[])
    arguments.deepspeed = {"train_batch_size": 4}  # as given to it where DeepSpeed is installed
    callback = StoppingCallback(StoppingConfig(cooldown_steps=5), returns_of)
    with pytest.raises(InputError, match="expected reductions and cooldown_steps of 0"):
        callback.on_init_end(arguments, TrainerState(), TrainerControl())


def test_intervals_and_weights_need_returns(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a level of error without returns_of"):
        StoppingCallback(StoppingConfig())
    with pytest.raises(InputError, match="best weights without returns_of"):
        StoppingCallback(POINTS, best=BestWeights())
    with pytest.raises(InputError, match="neither returns_of nor metric_for_best_model"):
        trained(tmp_path, StoppingCallback(POINTS))
