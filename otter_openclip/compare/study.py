"""The study: trials of every method's settings, then its chosen setting with several seeds.

All that is known lies in Optuna's storage, so that any number of processes on any machines work on one
study, and a killed one goes on: what it was at is done again by whoever has nothing else to do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from otter_openclip.compare.halves import CHOOSING, REPORTING
from otter_openclip.compare.trial import CLOSED_FORM, EVALUATIONS, FIT, Place, Setting, Stop, run

BATCHES = (128, 256, 512)
STEPS, QUICK_STEPS = (20, 600), (20, 80)
# The first trial of every method: what often did well, and losses' own settings at their defaults.
FIRST = {"lr": 1e-3, "steps": 100, "init-logit-scale": 2.0, "wd": 0.2, "feature-dropout": 0.3}
FIRST |= {"alpha": 0.5, "sinkhorn-lambda": 0.15, "label-smoothing": 0.1, "distill-T-t": 100.0}
FAILURES_TO_GIVE_UP = 3  # trials of a method that fail in this process, when none has succeeded
KEPT_SHARE = 67.0  # percent of the trials that go on after an evaluation
TUNING_SEED, SEEDS = 100, "seeds"


def draw(trial: Any, loss: str, frozen: bool, pairs: int, steps: tuple[int, int]) -> Setting:
    """A setting as ``trial``, Optuna's, suggests it: what all losses share, then the loss's own."""

    def log(name: str, low: float, high: float) -> float:
        return trial.suggest_float(name, low, high, log=True)

    sizes = [size for size in BATCHES if size <= pairs] or [pairs]
    setting = {
        "lr": log("lr", 3e-4, 3e-2) if frozen else log("lr", 1e-6, 1e-3),
        "steps": trial.suggest_int("steps", *steps, log=True),
        "init-logit-scale": trial.suggest_float("init-logit-scale", 1.5, 4.0),
        "wd": log("wd", 0.02, 5.0),
        "batch-size": trial.suggest_categorical("batch-size", sizes),
    }
    if frozen:
        setting["feature-dropout"] = trial.suggest_float("feature-dropout", 0.0, 0.7)
    if loss in ("kd", "otter"):
        setting["alpha"] = trial.suggest_float("alpha", 0.1, 0.9)
        # On frozen towers the student is as good a teacher as its average.
        setting |= {"ema-decay": 0.0} if frozen else {}
    if loss == "ls":
        setting["label-smoothing"] = log("label-smoothing", 0.01, 0.4)
    if loss == "kd":
        setting["distill-T-t"] = log("distill-T-t", 5.0, 100.0)
    if loss == "otter":
        setting["sinkhorn-lambda"] = log("sinkhorn-lambda", 0.03, 0.3)
    return setting


class Study:
    """What is to be done, what of it is known, and the doing of one piece.

    Attributes:
        failed: of methods no trial of which ended well, why.
        trials_each: of every method, among which its setting was chosen.
        chosen: by method the trial's number.
        errors: of what failed in this process, by the study's name and the trial's number.
    """

    def __init__(
        self,
        storage: str,
        task: dict[str, str],
        place: Place,
        methods: Sequence[str],
        **budget: Any,
    ) -> None:
        """Open or join the study in ``storage``; ``budget`` has trials, seeds, pairs and steps.

        Raises:
            ValueError: if that cannot be used, or is a study of another ``task``.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.place, self.methods = place, list(methods)
        self.trials, self.seeds = budget["trials"], budget["seeds"]
        self.space = place.frozen, budget["pairs"], budget["steps"]
        self.failed: dict[str, str] = {}
        self.errors: dict[tuple[str, int], str] = {}
        self.chosen: dict[str, int] = {}
        self.trials_each = 0
        try:
            path = None if "://" in storage else str(Path(storage).resolve())
            opened = optuna.storages.JournalStorage(JournalFileBackend(path)) if path else storage
            self.studies = {name: _join(opened, name) for name in [*self.tuned, SEEDS]}
            tasks = [study.user_attrs.get("task", task) for study in self.studies.values()]
            for study in self.studies.values():
                study.set_user_attr("task", study.user_attrs.get("task", task))
        except Exception as error:  # of every type: the database's, its driver's, JSON's
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"--storage {storage} cannot be used: {reason}") from error
        if other := [name for name, value in task.items() if {t[name] for t in tasks} != {value}]:
            raise ValueError(
                f"--storage {storage} is a study of other {' and '.join(other)}; name another"
            )

    @property
    def tuned(self) -> list[str]:
        """Methods that have settings to choose, but for those that failed."""
        return [m for m in self.methods if m != FIT and m not in self.failed]

    def _trials(self, name: str, *, ended: bool) -> list[Any]:
        every = self.studies[name].get_trials(deepcopy=False)
        return [trial for trial in every if trial.state.is_finished() is ended]

    def _ended(self, method: str) -> list[Any]:
        """The trials that count: if all have failed, by a full disk perhaps, only this process's."""
        ended = self._trials(method, ended=True)
        if all("error" in trial.user_attrs for trial in ended):
            return [trial for trial in ended if (method, trial.number) in self.errors]
        return ended

    def count(self) -> int:
        """Runs that have ended, of those that are wanted."""
        tuning = sum(min(self.trials, len(self._ended(method))) for method in self.tuned)
        return tuning + len(self.results())

    def tune_next(self, said: Callable[[str, int, float], None]) -> bool:
        """Do one trial, of the method that has the fewest; False if there are enough of all.

        ``said`` hears of every evaluation: method, number and mAP.
        """
        waiting: dict[str, list[Any]] = {}
        for method in self.tuned:
            ended = self._ended(method)
            failed = all("error" in trial.user_attrs for trial in ended)
            if failed and len(ended) >= FAILURES_TO_GIVE_UP:
                self.failed[method] = ended[-1].user_attrs["error"]
            elif len(ended) < self.trials:
                waiting[method] = ended + self._trials(method, ended=False)
        if not waiting:
            return False
        method = min(waiting, key=lambda each: len(waiting[each]))
        study, begun = self.studies[method], waiting[method]
        if len(begun) >= self.trials:  # one of them runs elsewhere, or was killed: it is done again
            study.enqueue_trial(next(t.params for t in begun if not t.state.is_finished()))
        elif self.place.frozen and not begun:
            study.enqueue_trial(FIRST | {"steps": min(FIRST["steps"], self.space[-1][1])})
        trial = study.ask()
        # By its number: the first are alike for every loss, and those of several processes differ.
        study.sampler = optuna.samplers.TPESampler(seed=trial.number)
        setting = draw(trial, method.rpartition("+")[2], *self.space)
        trial.set_user_attr("setting", setting)

        def report(epoch: int, value: float) -> None:
            said(method, epoch, value)
            trial.report(value, epoch)
            if epoch < EVALUATIONS and trial.should_prune():
                raise Stop

        place = replace(self.place, tests={CHOOSING: self.place.tests[CHOOSING]})
        self._do(
            method, trial, CHOOSING, lambda: run(method, setting, place, TUNING_SEED, report=report)
        )
        return True

    def _do(self, name: str, trial: Any, half: str, work: Callable[[], dict[str, Any]]) -> None:
        """Run, and tell the study how it ended."""
        try:
            outcome = work()
        except Stop:
            self.studies[name].tell(trial, state=TrialState.PRUNED)
        except RuntimeError as error:
            self.errors[name, trial.number] = str(error)
            trial.set_user_attr("error", str(error))
            self.studies[name].tell(trial, state=TrialState.FAIL)
        else:
            trial.set_user_attr("outcome", outcome)
            self.studies[name].tell(trial, outcome["metrics"][half]["mAP"])

    def choose(self) -> None:
        """Settle each method's setting: the best of as many trials as every method has.

        Which that is the storage keeps, for processes that come when others have added trials.
        """
        ended = {method: self._ended(method) for method in self.tuned}
        self.trials_each = alike = min([self.trials, *map(len, ended.values())])
        for method, trials in ended.items() if alike else ():
            good = [t for t in trials[:alike] if t.state == TrialState.COMPLETE]
            study, name = self.studies[method], f"chosen of {alike}"
            if not good:
                errors = [t.user_attrs["error"] for t in trials if "error" in t.user_attrs]
                self.failed[method] = [*errors, "no trial ended well"][0]
                continue
            if name not in study.user_attrs:
                study.set_user_attr(name, max(good, key=lambda t: t.value).number)
            self.chosen[method] = study.user_attrs[name]

    def setting(self, method: str) -> Setting:
        """The chosen one."""
        if method == FIT:
            return CLOSED_FORM
        trials = self.studies[method].get_trials(deepcopy=False)
        return trials[self.chosen[method]].user_attrs["setting"]

    def _repeats(self) -> dict[tuple[str, int], str]:
        """What is repeated, by method and seed: a name. The closed form has nothing that is drawn."""
        numbers = dict.fromkeys([FIT] if FIT in self.methods else [], 0) | self.chosen
        every = [(m, s) for s in range(self.seeds) for m in numbers if s == 0 or m != FIT]
        return {(m, s): f"{m}, trial {numbers[m]}, seed {s}" for m, s in every}

    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """By method and seed what repeats of the chosen settings gave."""
        outcomes = {
            t.user_attrs["repeat"]: t.user_attrs["outcome"]
            for t in self._trials(SEEDS, ended=True)
            if "outcome" in t.user_attrs
        }
        return {key: outcomes[name] for key, name in self._repeats().items() if name in outcomes}

    def repeat_next(self) -> bool:
        """Do one repeat that nobody has done, and that did not fail here; False if there is none."""
        running = {t.user_attrs.get("repeat") for t in self._trials(SEEDS, ended=False)}
        done = {
            trial.user_attrs["repeat"]
            for trial in self._trials(SEEDS, ended=True)
            if "outcome" in trial.user_attrs or (SEEDS, trial.number) in self.errors
        }
        missing = {name: key for key, name in self._repeats().items() if name not in done}
        if not missing:
            return False
        name = next((name for name in missing if name not in running), next(iter(missing)))
        method, seed = missing[name]
        trial = self.studies[SEEDS].ask()
        trial.set_user_attr("repeat", name)
        setting, named = self.setting(method), seed == 0
        self._do(
            SEEDS,
            trial,
            REPORTING,
            lambda: run(method, setting, self.place, seed, name_pictures=named),
        )
        return True

    def mean_seconds(self) -> float:
        """Of a trial that ended."""
        every = [t.duration for m in self.tuned for t in self._trials(m, ended=True)]
        return sum(d.total_seconds() for d in every) / max(1, len(every))

    def importances(self) -> dict[str, dict[str, float]]:
        """By method the share of the variance over trials that each setting explains, if it is known."""
        importances = {}
        for method in self.tuned:
            try:
                shares = optuna.importance.get_param_importances(self.studies[method])
            except (RuntimeError, ValueError):  # too few trials, or all alike
                continue
            importances[method] = {name: round(share, 3) for name, share in shares.items()}
        return importances


def _join(storage: Any, name: str) -> optuna.Study:
    settings = {
        "storage": storage,
        "study_name": f"otter-openclip compare: {name}",
        "direction": "maximize",
        "pruner": optuna.pruners.PercentilePruner(KEPT_SHARE, n_warmup_steps=2),
        "load_if_exists": True,
    }
    try:
        return optuna.create_study(**settings)
    except Exception:  # of two that begin at once, and make a database's tables, one fails
        time.sleep(1)
        return optuna.create_study(**settings)
