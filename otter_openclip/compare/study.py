"""The study: trials of every method's settings, then its chosen setting with several seeds.

All that is known lies in Optuna's storage, so that any number of processes on any machines work on one
study, and a killed one goes on: what it was at is done again by whoever has nothing else to do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from otter_openclip.compare import trial as runs
from otter_openclip.compare.halves import HALVES
from otter_openclip.compare.trial import FIT, Place, Setting

BATCHES = (128, 256, 512)
STEPS = (20, 600)
QUICK_STEPS = (20, 100)
RATES = {True: (3e-4, 3e-2), False: (1e-6, 1e-3)}  # of heads on frozen towers, and of whole towers
HOPELESS = 3  # trials of a method that failed, and none that did not
KEPT_SHARE = 67.0  # percent of the trials that go on after an evaluation
TASK = "otter-openclip compare"
TUNING_SEED = 100


def draw(trial: Any, loss: str, *, frozen: bool, pairs: int, steps: tuple[int, int]) -> Setting:
    """A setting of ``loss``, as ``trial``, Optuna's, suggests it. The first six are every loss's."""
    setting = {
        "lr": trial.suggest_float("lr", *RATES[frozen], log=True),
        "steps": trial.suggest_int("steps", *steps, log=True),
        "init-logit-scale": trial.suggest_float("init-logit-scale", 1.5, 4.0),
        "wd": trial.suggest_float("wd", 0.02, 5.0, log=True),
        "batch-size": trial.suggest_categorical(
            "batch-size", [size for size in BATCHES if size <= pairs] or [pairs]
        ),
    }
    if frozen:
        setting["feature-dropout"] = trial.suggest_float("feature-dropout", 0.0, 0.7)
    if loss == "ls":
        setting["label-smoothing"] = trial.suggest_float("label-smoothing", 0.01, 0.4, log=True)
    if loss in ("kd", "otter"):
        setting["alpha"] = trial.suggest_float("alpha", 0.1, 0.9)
        if frozen:  # where the student is as good a teacher as its average
            setting["ema-decay"] = 0.0
    if loss == "kd":
        setting["distill-T-t"] = trial.suggest_float("distill-T-t", 5.0, 100.0, log=True)
    if loss == "otter":
        setting["sinkhorn-lambda"] = trial.suggest_float("sinkhorn-lambda", 0.03, 0.3, log=True)
    return setting


def open_storage(where: str) -> Any:
    """Optuna's storage: a journal in a file, or a database by its URL."""
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in where:
        return RDBStorage(where)
    return JournalStorage(JournalFileBackend(where))


class Study:
    """What is to be done, what of it is known, and the doing of one piece.

    Attributes:
        methods: all of them, in the order of the report.
        failed: of methods no trial of which ended well, the last error.
        trials_each: of every method, among which its setting was chosen.
    """

    def __init__(
        self,
        storage: str,
        task: dict[str, Any],
        place: Place,
        methods: Sequence[str],
        *,
        pairs: int,
        trials: int,
        seeds: int,
        steps: tuple[int, int] = STEPS,
    ) -> None:
        """Open or join the study in ``storage``.

        Raises:
            ValueError: if that cannot be used, or is a study of another ``task``.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna, self.place, self.methods = optuna, place, list(methods)
        self.trials, self.seeds = trials, seeds
        self.space = {"frozen": place.frozen, "pairs": pairs, "steps": steps}
        self.trials_each = 0
        self.failed: dict[str, str] = {}
        self._setting_numbers: dict[str, int] = {}
        try:
            opened = open_storage(storage)
            names = [*(m for m in methods if m != FIT), "seeds"]
            self.studies = {name: self._join(opened, name, task) for name in names}
        except ForeignStudy as error:
            raise ValueError(f"--storage {storage} {error}; name another") from error
        except Exception as error:  # of every type: the database's, its driver's, JSON's
            raise ValueError(f"--storage {storage} cannot be used: {error}") from error

    def _join(self, storage: Any, name: str, task: dict[str, Any]) -> Any:
        study = self.optuna.create_study(
            storage=storage,
            study_name=f"{TASK}: {name}",
            direction="maximize",
            pruner=self.optuna.pruners.PercentilePruner(KEPT_SHARE, n_warmup_steps=1),
            load_if_exists=True,
        )
        if study.user_attrs.setdefault("task", task) != task:
            different = [k for k, v in task.items() if study.user_attrs["task"].get(k) != v]
            raise ForeignStudy(f"holds a study of other {' and '.join(different)}")
        study.set_user_attr("task", task)
        return study

    # What is known ------------------------------------------------------------------------------

    def _by_state(self, name: str) -> tuple[list[Any], list[Any]]:
        """The study's trials that have ended, and those that run."""
        every = self.studies[name].get_trials(deepcopy=False)
        return [t for t in every if t.state.is_finished()], [
            t for t in every if not t.state.is_finished()
        ]

    def _well(self, trials: Sequence[Any]) -> list[Any]:
        return [t for t in trials if t.state == self.optuna.trial.TrialState.COMPLETE]

    @property
    def tuned(self) -> list[str]:
        """Methods that have settings to choose, but for those that are given up."""
        return [m for m in self.methods if m != FIT and m not in self.failed]

    def counts(self) -> tuple[int, int]:
        """Trials and repeats that have ended, of those that are wanted."""
        tuning = sum(min(self.trials, len(self._by_state(m)[0])) for m in self.tuned)
        return tuning, len(self.results())

    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """By method and seed what repeats of the chosen settings gave."""
        done = {t.user_attrs["key"]: t.user_attrs["result"] for t in self._well(self._by_state("seeds")[0])}
        return {(m, s): done[key] for (m, s), key in self._keys().items() if key in done}

    def _keys(self) -> dict[tuple[str, int], str]:
        """What is repeated: by method and seed a name that has the number of the chosen trial."""
        numbers = {m: self._setting_numbers.get(m, 0) for m in self.methods if m not in self.failed}
        # The closed form has nothing that is drawn.
        return {
            (m, seed): f"{m}, trial {number}, seed {seed}"
            for seed in range(self.seeds)
            for m, number in numbers.items()
            if seed == 0 or m != FIT
        }

    # What is done -------------------------------------------------------------------------------

    def tune_next(self, said: Callable[[str, int, float], None]) -> bool:
        """Do one trial, of the method that has the fewest; False if there are enough of all.

        ``said`` hears of every evaluation: method, number and mAP.
        """
        waiting = []
        for method in self.tuned:
            ended, running = self._by_state(method)
            if len(ended) >= HOPELESS and all("error" in t.user_attrs for t in ended):
                self.failed[method] = ended[-1].user_attrs["error"]
            elif len(ended) < self.trials:
                # One that runs elsewhere may have been killed: once all others are taken it is replaced.
                waiting.append((len(ended) + len(running) >= self.trials, len(ended) + len(running), method))
        if not waiting:
            return False
        *_, method = min(waiting, key=lambda entry: entry[:2])
        self._tune(method, said)
        return True

    def _tune(self, method: str, said: Callable[[str, int, float], None]) -> None:
        study = self.studies[method]
        trial = study.ask()
        # By its number: the first are alike for every loss, and those of several processes differ.
        study.sampler = self.optuna.samplers.TPESampler(seed=trial.number)
        setting = draw(trial, method.rpartition("+")[2], **self.space)
        trial.set_user_attr("setting", setting)

        def report(epoch: int, value: float) -> None:
            said(method, epoch, value)
            trial.report(value, epoch)
            if epoch < runs.EVALUATIONS and trial.should_prune():
                raise runs.Stop

        states = self.optuna.trial.TrialState
        try:
            tests = HALVES[:1]
            outcome = runs.run(method, setting, self.place, TUNING_SEED, tests=tests, report=report)
        except runs.Stop:
            study.tell(trial, state=states.PRUNED)
        except RuntimeError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=states.FAIL)
        else:
            study.tell(trial, outcome.metrics[HALVES[0]]["mAP"])

    def choose(self) -> None:
        """Settle each method's setting: the best of as many trials as every method has.

        Which that is the storage keeps, for processes that come to other trials later.
        """
        ended = {m: sorted(self._by_state(m)[0], key=lambda t: t.number) for m in self.tuned}
        alike = min([self.trials, *(len(trials) for trials in ended.values())])
        self.trials_each = alike
        for method, trials in ended.items() if alike else ():
            study, name = self.studies[method], f"chosen of {alike}"
            if not (good := self._well(trials[:alike])):
                errors = [t.user_attrs["error"] for t in trials if "error" in t.user_attrs]
                self.failed[method] = errors[-1] if errors else "no trial ended by itself"
                continue
            if name not in study.user_attrs:
                study.set_user_attr(name, max(good, key=lambda t: t.value).number)
            self._setting_numbers[method] = study.user_attrs[name]

    def setting(self, method: str) -> Setting:
        """The chosen one."""
        if method == FIT:
            return runs.closed_form()
        number = self._setting_numbers[method]
        return self.studies[method].get_trials(deepcopy=False)[number].user_attrs["setting"]

    def repeat_next(self) -> bool:
        """Do one repeat that nobody has done; False if there is none."""
        study, keys = self.studies["seeds"], self._keys()
        ended, running = self._by_state("seeds")
        done = {t.user_attrs.get("key") for t in ended}
        taken = {t.user_attrs.get("key") for t in running}
        missing = [each for each, key in keys.items() if key not in done]
        if not missing:
            return False
        free = [each for each in missing if keys[each] not in taken]
        method, seed = (free or missing)[0]
        trial = study.ask()
        trial.set_user_attr("key", keys[method, seed])
        try:
            outcome = runs.run(method, self.setting(method), self.place, seed, name_pictures=seed == 0)
        except RuntimeError as error:
            trial.set_user_attr("error", str(error))
            study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
        else:
            trial.set_user_attr("result", outcome._asdict())
            study.tell(trial, outcome.metrics[HALVES[1]]["mAP"])
        return True

    def mean_seconds(self) -> float:
        """Of a trial that ended by itself."""
        every = [t for m in self.tuned for t in self._well(self._by_state(m)[0])]
        seconds = [t.duration.total_seconds() for t in every]
        return sum(seconds) / len(seconds) if seconds else 0.0

    def importances(self) -> dict[str, dict[str, float]]:
        """By method how much each setting mattered, shares of the variance; where that can be told."""
        found = {}
        for method in self.tuned:
            try:
                shares = self.optuna.importance.get_param_importances(self.studies[method])
            except (RuntimeError, ValueError):  # too few trials, or all alike
                continue
            found[method] = {name: round(share, 3) for name, share in shares.items()}
        return found


class ForeignStudy(Exception):
    """A storage holds something else."""
