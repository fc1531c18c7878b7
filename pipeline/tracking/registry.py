"""The registered model of a recipe: which version is champion, which challenger, and why.

`pipeline.tracking.models` registers the versions.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from sensmerge.pipeline.recipe.gate import MEAN_NORMALISED
from sensmerge.pipeline.report.gate import Outcomes, Verdict, passes
from sensmerge.pipeline.report.report import Report
from sensmerge.pipeline.store.store import Store
from sensmerge.pipeline.tracking.client import connected, if_there
from sensmerge.pipeline.tracking.models import EVALUATED_BY, FREED, OUTCOMES, mark_weights, same_version
from sensmerge.tasks.errors import InputError
from sensmerge.tasks.kinds.scores import Score

CHAMPION, CHALLENGER = "champion", "challenger"
FORMER = "former_champion"
"""Tag of a version that became champion: the version that was it before."""
PINNED = "pinned"
"""Tag that users set on a version whose weights have to stay; any value but `false`."""


@dataclass(frozen=True)
class Version:
    """A version of a recipe's registered model."""

    recipe: str
    number: str
    variant: str
    kind: str | None
    """static or dynamic; None of a version that was registered before this was kept"""
    digest: str
    folder: str
    """URI of its folder"""
    evaluated_by: str
    """id of the MLflow run that has its outcomes"""
    former: str | None
    """the version that was champion before this one became it"""

    def __str__(self) -> str:
        """Name it as `compare` takes it."""
        kind = ", dynamic" if self.kind == "dynamic" else ""
        return f"{self.recipe}/{self.number} ({self.variant}{kind})"


@dataclass(frozen=True)
class ModelRegistry:
    """The versions of one recipe at a tracking URI."""

    uri: str
    recipe: str

    def of_variant(self, report: Report, variant: str) -> Version:
        """Return the version of a variant of a report; `tracking.models` has registered it."""
        kind = "dynamic" if variant in report.routes else "static"
        tags = {"variant": variant, "kind": kind, "digest": report.variants[variant].digest}
        with connected(self.uri) as client:
            wanted = same_version(self.recipe, tags | {"folder": report.uris[variant]})
            (found,) = client.search_model_versions(wanted, max_results=1)
            return _version(found)

    def champion(self) -> Version | None:
        """Return the champion, if there is one."""
        return self._alias(CHAMPION)

    def find(self, text: str) -> Version:
        """Return the version with a number, or with an alias (champion, challenger or any other).

        Raises:
            InputError: there is none.
        """
        if not re.fullmatch(r"\d+", text):
            found = self._alias(text)
            if found is None:
                raise InputError(f"{self.recipe}@{text}: no version has this alias; see the model in MLflow")
            return found
        with connected(self.uri) as client:
            version = if_there(lambda: client.get_model_version(self.recipe, text))
        if version is None:
            raise InputError(f"{self.recipe}/{text}: no such version; see the model in MLflow")
        return _version(version)

    def outcomes(self, version: Version) -> dict[str, Outcomes]:
        """Return what a version did with every evaluation sample, by task."""
        with connected(self.uri) as client, TemporaryDirectory() as folder:
            path = client.download_artifacts(version.evaluated_by, OUTCOMES, folder)
            found = json.loads(Path(path).read_text())
        return {task: Outcomes.model_validate(one) for task, one in found.items()}

    def mean(self, version: Version) -> Score | None:
        """Return the mean over tasks of a version's main metric ÷ the own expert's; None where it has none."""
        with connected(self.uri) as client:
            found = client.get_run(version.evaluated_by).data.metrics
        values = [found.get(f"{group}/{MEAN_NORMALISED}", math.nan) for group in ("eval", "n", "low", "high")]
        if any(map(math.isnan, values)):
            return None
        value, n, low, high = values
        return Score(value, int(n), low, high)

    def propose(self, version: Version, champion: Version, verdicts: Sequence[Verdict]) -> None:
        """Make a version challenger, with what the gate says of it as tags: `gate`, and `gate/TASK` for each task."""
        failed = [verdict.task for verdict in verdicts if not verdict.passed]
        said = f"refused against version {champion.number}: {', '.join(failed)}"
        tags = {"gate": said if failed else f"passed against version {champion.number}"}
        tags |= {f"gate/{verdict.task}": str(verdict) for verdict in verdicts}
        assert passes(verdicts) == (not failed)
        with connected(self.uri) as client:
            client.set_registered_model_alias(self.recipe, CHALLENGER, version.number)
            self._tag(client, version, tags)

    def promote(self, version: Version) -> None:
        """Make a version champion, and remember the former one; it is no longer challenger."""
        former, challenger = self.champion(), self._alias(CHALLENGER)
        with connected(self.uri) as client:
            if former is not None and former.number != version.number:
                self._tag(client, version, {FORMER: former.number})
            client.set_registered_model_alias(self.recipe, CHAMPION, version.number)
            if challenger is not None and challenger.number == version.number:
                client.delete_registered_model_alias(self.recipe, CHALLENGER)

    def former(self) -> tuple[Version, Version]:
        """Return the champion, and the one before it.

        Raises:
            InputError: there is no champion, or none before it.
        """
        champion = self.champion()
        if champion is None or champion.former is None:
            what = "no champion" if champion is None else f"no champion before version {champion.number}"
            raise InputError(f"{self.recipe}: {what} to go back to; choose a version with promote")
        return champion, self.find(champion.former)

    def restore(self, version: Version) -> None:
        """Make a former champion champion again; what was champion before it stays in mind."""
        with connected(self.uri) as client:
            client.set_registered_model_alias(self.recipe, CHAMPION, version.number)

    def _alias(self, alias: str) -> Version | None:
        with connected(self.uri) as client:
            found = if_there(lambda: client.get_model_version_by_alias(self.recipe, alias))
        return None if found is None else _version(found)

    def _tag(self, client: Any, version: Version, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(self.recipe, version.number, key, value)


def loss_of_champion(recipe: str, store: Store, uri: str) -> str | None:
    """Say what is gone of the champion's model; None if it is whole, or there is no champion.

    Args:
        recipe: its name.
        store: the recipe's.
        uri: where its runs are recorded.
    """
    champion = ModelRegistry(uri, recipe).champion()
    gone = None if champion is None else store.lacking(champion.folder)
    return None if gone is None else f"{champion} is champion, but can no longer be loaded: {gone}"


def check_whole(version: Version, store: Store) -> None:
    """Check that a version's model can be loaded: that its files are there, whole.

    Raises:
        InputError: they are not; names the version and the file.
    """
    gone = store.lacking(version.folder)
    if gone is not None:
        raise InputError(
            f"{version}: {gone}; run the recipe as it was to restore it, name the store with --store if this machine "
            "has it elsewhere, or name another version"
        )


@dataclass(frozen=True)
class Registered:
    """A version of a registered model, as garbage collection sees it."""

    recipe: str
    number: str
    folder: str
    """URI of its folder"""
    stays: str | None
    """why its weights have to stay; None if nothing asks for it"""
    is_marked: bool
    """whether it is said already that its weights were freed"""

    @property
    def artifact(self) -> str:
        """What its folder is called in its store, wherever that is: `stage/name-hash8`."""
        return "/".join(url2pathname(urlparse(self.folder).path).rstrip("/").split("/")[-2:])


def registered_versions(uri: str) -> list[Registered]:
    """Return the versions of all recipes at a tracking URI; models that sensmerge did not register are left out.

    What has an alias stays, what has the tag `pinned`, and what was champion last and can be it again by `rollback`.
    """
    found = []
    with connected(uri) as client:
        for model in _pages(lambda token: client.search_registered_models(page_token=token)):
            aliases: dict[str, list[str]] = {}
            for alias, number in model.aliases.items():
                aliases.setdefault(str(number), []).append(f"{alias} of {model.name}")
            versions = _pages(partial(_versions_page, client, model.name))
            for version in versions:
                former = version.tags.get(FORMER)
                if former is not None and f"{CHAMPION} of {model.name}" in aliases.get(str(version.version), []):
                    aliases.setdefault(former, []).append(f"former {CHAMPION} of {model.name}")
            for version in versions:
                tags, number = version.tags, str(version.version)
                pinned = [f"pinned version {number} of {model.name}"] * (tags.get(PINNED, "false") != "false")
                why = [*aliases.get(number, []), *pinned]
                if "folder" in tags:
                    stays = why[0] if why else None
                    found.append(Registered(model.name, number, tags["folder"], stays, FREED in tags))
    return found


def mark_freed(uri: str, versions: Sequence[Registered]) -> None:
    """Say of versions that their weights were freed now: tag, description, and status of their LoggedModels."""
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    with connected(uri) as client:
        for version in versions:
            mark_weights(client, version.recipe, version.number, version.folder, now)


def _versions_page(client: Any, recipe: str, token: str | None) -> Any:
    return client.search_model_versions(f"name = '{recipe}'", page_token=token)


def _pages(ask: Callable[[str | None], Any]) -> list[Any]:
    """Return what a search finds, on all its pages."""
    found: list[Any] = []
    token: str | None = None
    while token != "":
        page = ask(token)
        found += page
        token = page.token or ""
    return found


def _version(found: Any) -> Version:
    tags = found.tags
    missing = {"variant", "digest", "folder", EVALUATED_BY} - tags.keys()
    if missing:
        raise InputError(f"{found.name}/{found.version}: has no tag {min(missing)}; it was not registered by sensmerge")
    return Version(
        found.name,
        str(found.version),
        tags["variant"],
        tags.get("kind"),
        tags["digest"],
        tags["folder"],
        tags[EVALUATED_BY],
        tags.get(FORMER),
    )


def parse_version(text: str) -> tuple[str, str]:
    """Read RECIPE@ALIAS or RECIPE/NUMBER; return the recipe's name, and the alias or number.

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"([A-Za-z0-9._-]+)(?:@([A-Za-z][\w-]*)|/(\d+))", text)
    if not found:
        raise InputError(f"{text!r}: expected RECIPE@ALIAS or RECIPE/NUMBER, such as smollm2-lora@champion")
    return found[1], found[2] or found[3]
