"""A stopping rule for transformers' Trainer, and for trainers that extend it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from haltwise.errors import InputError, from_clone, needing
from haltwise.training.config import StoppingConfig
from haltwise.training.curve import MeanReturn, Returns
from haltwise.training.rule import Decision, StoppingRule

with needing("haltwise.training.trainer", from_clone("training")):
    import torch
    from torch import nn
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState

    from haltwise.training.averaging import BestWeights

log = logging.getLogger(__name__)


class StoppingCallback(TrainerCallback, ExportableState):
    """Stops a Trainer by a `StoppingRule`, at the evaluations that the Trainer makes.

    The learning rate is lowered for the optimizer's step alone: the Trainer's schedule goes on
    beneath it, neither sees nor undoes it, and what is logged as learning_rate is the schedule's. A
    larger batch comes with the next epoch, by more steps of gradient accumulation. A checkpoint of
    the Trainer holds the rule's state, and training from it goes on with that.

    Attributes:
        rule: The rule, with the curve so far and its latest decision.
    """

    def __init__(
        self,
        config: StoppingConfig,
        returns_of: Callable[[nn.Module], Returns] | None = None,
        best: BestWeights | None = None,
    ) -> None:
        """Prepares for one training.

        Args:
            config: When to stop.
            returns_of: Evaluates the model on held-out questions, the same ones in the same order
                each time, and in every process. None takes the Trainer's own
                `metric_for_best_model`, a point without its error.
            best: Keeps the best weights, which the model has after the training, or their average.

        Raises:
            InputError: If a setting is out of its range, or needs returns of the questions.
        """
        self.rule = StoppingRule(config)
        if returns_of is None:
            needs = "best weights" if best is not None else "a level of error"
            if best is not None or (config.patience and config.level is not None):
                raise InputError(f"{needs} without returns_of, expected it, or a level of None")
        self._returns_of, self._best = returns_of, best
        self._scheduled: list[Any] = []  # the learning rates that a step has replaced
        self._gradient_norm: float | None = None
        self._accumulation: int | None = None  # the steps that the training has begun with

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses settings of the Trainer that the rule cannot work with.

        Raises:
            InputError: If there are such.
        """
        config = self.rule.config
        if args.restore_callback_states_from_checkpoint:
            raise InputError(
                "restore_callback_states_from_checkpoint is True, which makes callbacks anew: "
                "expected False, this one restores itself"
            )
        if config.patience and args.eval_strategy == "no":
            raise InputError(
                "eval_strategy is no, expected steps or epoch: plateaus need evaluations"
            )
        if args.deepspeed and (config.cooldown_steps or config.reductions):
            raise InputError(
                "DeepSpeed takes its steps by itself, at the rate of the schedule: expected "
                "reductions and cooldown_steps of 0"
            )
        if self._returns_of is None and config.patience and args.metric_for_best_model is None:
            raise InputError("neither returns_of nor metric_for_best_model, expected one of them")
        has_budget = math.isfinite(config.most_tokens)
        if has_budget and args.include_num_input_tokens_seen in ("no", False):
            raise InputError(
                "include_num_input_tokens_seen is no, expected all or non_padding with a budget"
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Goes on from the checkpoint that the Trainer goes on from, if it does."""
        self._accumulation = args.gradient_accumulation_steps
        kept: Any = state.stateful_callbacks  # its annotation is that of what makes a state
        if state.global_step and type(self).__name__ in kept:
            self.rule.restore(kept[type(self).__name__]["attributes"]["rule"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raises the batch size as far as plateaus have asked for it."""
        assert self._accumulation is not None
        args.gradient_accumulation_steps = round(self._accumulation * self.rule.batch)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Lowers the learning rates for one step, and looks at its gradient."""
        groups = kwargs["optimizer"].param_groups
        self._scheduled = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = group["lr"] * self.rule.rate
        self._gradient_norm = None
        if self.rule.config.gradient_floor is not None:
            grads = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
            self._gradient_norm = float(torch.nn.utils.get_total_norm(grads))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Puts the learning rates of the schedule back."""
        for group, scheduled in zip(kwargs["optimizer"].param_groups, self._scheduled, strict=True):
            group["lr"] = scheduled

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stops when a budget is used up, the gradient has vanished or all has cooled down."""
        num_tokens = int(state.num_input_tokens_seen)
        if math.isfinite(self.rule.config.most_tokens) and not num_tokens:
            raise InputError(
                f"the Trainer counts no tokens of {type(kwargs['model']).__name__}, expected it to "
                "say its main_input_name"
            )
        decision = self.rule.stepped(state.global_step, num_tokens, self._gradient_norm)
        self._obey(decision, state, control)
        if control.should_training_stop and args.eval_strategy != "no":
            control.should_evaluate = True  # the last weights may be the best ones

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes in an evaluation; of several at one step only the first with returns counts."""
        steps = self.rule.curve.steps
        if steps and state.global_step <= steps[-1]:
            return
        found = self._found(args, kwargs["model"], kwargs["metrics"])
        if found is None:
            return
        self._obey(self.rule.evaluated(state.global_step, found), state, control)
        if self._best is not None:
            self._best.offer(self.rule.curve.means[-1], kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the model its best weights, if they were kept."""
        assert self._accumulation is not None
        args.gradient_accumulation_steps = self._accumulation
        if self._best is not None and self._best.means:
            assert self._returns_of is not None
            is_average = self._best.settle(kwargs["model"], self._returns_of)
            log.info("weights: %s", "the average of the best" if is_average else "the best")

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint of the Trainer keeps."""
        return {"args": {}, "attributes": {"rule": self.rule.state()}}

    def _found(
        self, args: TrainingArguments, model: nn.Module, metrics: dict[str, float]
    ) -> Returns | None:
        """Returns what the evaluation found; None if its metrics are not those to go by."""
        if self._returns_of is not None:
            return self._returns_of(model)
        if args.metric_for_best_model is None:
            return None  # no plateau is asked for
        name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
        if name not in metrics:
            log.warning("no %s in %s: this evaluation does not count", name, sorted(metrics))
            return None
        return MeanReturn(metrics[name] if args.greater_is_better else -metrics[name])

    def _obey(self, decision: Decision, state: TrainerState, control: TrainerControl) -> None:
        """Does what the rule says, and tells it in the Trainer's log."""
        if decision.action == "go on":
            return
        if decision.action == "stop":
            control.should_training_stop = True
        told = f"{decision.action}: {decision.reason}"
        history: list[Any] = state.log_history  # of numbers, by its annotation
        if not any(entry.get("stopping_rule") == told for entry in history):
            history.append({"stopping_rule": told, "step": state.global_step})
            log.info(told)
