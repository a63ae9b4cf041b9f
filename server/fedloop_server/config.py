"""The server's configuration: `DIR/server/server.toml`, decoded strictly. What rounds are planned by is the task's."""

from __future__ import annotations

import math
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.hours import DayHours, zone
from fedloop_tasks.task import Plan
from msgspec import Meta, Struct
from msgspec.structs import replace

from fedloop_server import schedules, triggers
from fedloop_server.triggers import Trigger

NONE: Final = "none"
TRIGGER: Final = "trigger"
"""The table of triggers."""
COHORT: Final = 64
"""Most updates that one round needs, unless the operator says otherwise."""
MAX_COHORT = 1_500
"""`ReleaseProposed` names each update that went in, and is one event of at most 60 KiB."""

_Number = Annotated[float, Meta(gt=0, le=1e12)]
_Many = Annotated[int, Meta(ge=1, le=1_000_000)]


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the operator decides; `meaning` says what each value means. `plan` holds what the task plans its rounds by: in the
    file its keys stand beside the others. `triggers` are the file's tables `[trigger.NAME]`.

    Raises `UsageError` for values that promise nothing sensible together (types and ranges are checked where a file is decoded).
    """

    plan: Plan
    quorum: _Many = 2
    cohort_size: Annotated[int, Meta(ge=1, le=MAX_COHORT)] = COHORT
    unasked_rounds: _Many = 20
    min_examples: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    over_selection: Annotated[float, Meta(ge=1, le=10)] = 1.0
    buffer_size: Annotated[int, Meta(ge=0, le=MAX_COHORT)] = 0
    max_staleness: _Many = 10
    deadline_s: _Number = 600.0
    grace_s: _Number = 60.0
    availability_s: _Number = 120.0
    quorum_wait_s: _Number = 600.0
    max_update_norm: _Number = 1000.0
    max_upload_bytes: Annotated[int, Meta(ge=1, le=2**40)] = 64 << 20
    gate_margin: Annotated[float, Meta(ge=0, le=1)] = 0.02
    sweep_days: Annotated[float, Meta(ge=1, le=36_500)] = 7.0
    schedule: str = NONE
    windows: str = NONE
    time_zone: str = "UTC"
    model_dir: Annotated[str, Meta(max_length=4096)] = ""
    triggers: tuple[Trigger, ...] = ()

    def __post_init__(self) -> None:
        if self.cohort_size < self.quorum:
            raise _wrong("quorum", self.quorum, f"at most cohort_size, which is {self.cohort_size}")
        if self.asked > MAX_COHORT:
            allowed = f"cohort_size is {self.cohort_size}, and no more than {MAX_COHORT} clients can be asked"
            raise _wrong("over_selection", self.over_selection, allowed)
        if self.buffer_size and not self.quorum <= self.buffer_size <= self.cohort_size:
            allowed = f"0, or from quorum ({self.quorum}) to cohort_size ({self.cohort_size})"
            raise _wrong("buffer_size", self.buffer_size, allowed)
        zone(self.time_zone)
        if self.schedule != NONE:
            schedules.check(self.schedule, self.time_zone)
        if self.windows != NONE:
            DayHours.parse(self.windows)

    @property
    def asked(self) -> int:
        """Most clients that one round asks."""
        return math.ceil(self.cohort_size * self.over_selection)

    @property
    def hours(self) -> DayHours | None:
        """The hours in which rounds may open; None if that is always."""
        return None if self.windows == NONE else DayHours.parse(self.windows, self.time_zone)


_MEANING: Final = {
    "quorum": "Fewest clients that a round may start with, and fewest updates that make a release.",
    "cohort_size": f"Most updates that one round needs, at most {MAX_COHORT}; with them it ends.",
    "unasked_rounds": "Rounds after which a client that was not asked goes first, or four times those that ask everybody once.",
    "min_examples": "Examples that a client must report at least (it reports a power of two, or 0).",
    "over_selection": "So many times cohort_size are asked, where there are as many: the slowest need not answer.",
    "buffer_size": "Updates that end a round of training while the others go on for the next one; 0: a round waits for them.",
    "max_staleness": "Rounds after its own in which an update still counts, with less weight, where buffer_size is not 0.",
    "deadline_s": "Seconds that clients have for a round.",
    "grace_s": "Seconds for which a round goes on once its quorum has answered, or as long as that took, if it took longer.",
    "availability_s": "Seconds for which a client counts as available after it was last seen.",
    "quorum_wait_s": "Seconds that a request waits for enough clients before it is given up.",
    "max_update_norm": "L2 norm of an update's change, above which it is refused (where it is more, what the task allows).",
    "max_upload_bytes": "Bytes of an update's tensors, above which it is refused.",
    "gate_margin": "How much worse than the current release, beyond what chance explains, a new one's leading metric may be.",
    "sweep_days": "Days after which a blob is removed that no event names: the server looks once a day.",
    "schedule": 'When a round is requested, as cron says it: "30 2 * * *" is at half past two at night; "none": only on request.',
    "windows": 'Hours in which rounds may open, as in "22-06" or "12:30-13:15,22-06"; "none": at all hours.',
    "time_zone": 'Time zone of the schedule and the windows, as in "Europe/Berlin".',
    "model_dir": "Folder of base models; empty: those that this user has added, and the installed packages.",
}


def meaning(plan: type[Plan]) -> dict[str, str]:
    """Every key of the configuration of a deployment whose task plans so, with what it means."""
    return {**plan.MEANING, **_MEANING}


def load(path: Path, plan: type[Plan]) -> ServerConfig:
    """The configuration in a TOML file. Raises `UsageError` that names the key, its value and what is allowed."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}", hint="run `fedloop server init` again as before: it writes a new one") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read as TOML: {error}",
            hint="mend it, or move it away and run `fedloop server init` again as before: it writes a new one",
        ) from None
    return decode(found, plan)


def decode(found: dict[str, Any], plan: type[Plan]) -> ServerConfig:
    """The configuration that a parsed TOML table holds; `load` says what it raises."""
    fields = {key: kind for each in (plan, ServerConfig) for key, kind in get_type_hints(each, include_extras=True).items()}
    meanings = meaning(plan)
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key == TRIGGER:
            continue
        if key not in meanings:
            near = get_close_matches(key, meanings, 1)
            meant = f'; did you mean "{near[0]}"?' if near else ""
            raise UsageError(
                f'"{key}" is no key of the server\'s configuration{meant}', hint=f"the keys are {', '.join(meanings)}"
            )
        if value == plan.NONE.get(key, ()):
            values[key] = None
            continue
        try:
            values[key] = msgspec.convert(_finite(value), fields[key])
        except msgspec.ValidationError as error:
            expected = str(error).replace(" | null", f' or "{plan.NONE.get(key)}"').replace("`", "")
            raise _wrong(key, value, f"{expected[:1].lower()}{expected[1:]}. {meanings[key]}") from None
    planned = plan(**{key: value for key, value in values.items() if key in plan.MEANING})
    config = ServerConfig(plan=planned, **{key: value for key, value in values.items() if key in _MEANING})
    return replace(config, triggers=triggers.decode(found.get(TRIGGER, {}), config.time_zone))


def dump(config: ServerConfig) -> str:
    """The TOML text of a configuration, each key with what it means: `decode` gives the same configuration back."""
    lines = ["# Configuration of a Fedloop server, which reads it when it starts.", ""]
    for key, meant in meaning(type(config.plan)).items():
        value = getattr(config.plan if key in config.plan.MEANING else config, key)
        shown = config.plan.NONE[key] if value is None else value
        lines += [f"# {meant}", f"{key} = {msgspec.json.encode(shown).decode()}", ""]
    return "\n".join([*lines, triggers.dump(config.triggers)])


def _finite(value: object) -> object:
    # TOML's inf and nan would pass a bound on one side; its booleans are Python's integers.
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise msgspec.ValidationError("expected a finite number or a word")
    return value


def _wrong(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{key} = {value!r} in the server's configuration is not allowed: {allowed}")
