"""The registered model of a recipe: which version is champion, which challenger, and why.

`pipeline.tracking` registers the versions.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

from pipeline.gate import Outcomes, Verdict, passes
from pipeline.tracking import EVALUATED_BY, OUTCOMES, connected, if_there, same_version
from tasks.errors import InputError

CHAMPION, CHALLENGER = "champion", "challenger"
FORMER = "former_champion"
"""Tag of a version that became champion: the version that was it before."""


@dataclass(frozen=True)
class Version:
    """A version of a recipe's registered model."""

    recipe: str
    number: str
    variant: str
    kind: str | None
    """static or dynamic; None of a version that was registered before this was kept"""
    digest: str
    evaluated_by: str
    """id of the MLflow run that has its outcomes"""
    former: str | None
    """the version that was champion before this one became it"""

    def __str__(self) -> str:
        """Name it as `compare` takes it."""
        kind = ", dynamic" if self.kind == "dynamic" else ""
        return f"{self.recipe}/{self.number} ({self.variant}{kind})"


@dataclass(frozen=True)
class Registry:
    """The versions of one recipe at a tracking URI."""

    uri: str
    recipe: str

    def of_variant(self, variant: str, kind: str, digest: str) -> Version:
        """Return the version of a variant with these weights; `tracking.record` has registered it."""
        with connected(self.uri) as client:
            wanted = same_version(self.recipe, {"variant": variant, "kind": kind, "digest": digest})
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

    def propose(self, version: Version, champion: Version, verdicts: Sequence[Verdict]) -> None:
        """Make a version challenger, with what the gate says of it as tags: `gate`, and `gate/TASK` for each task."""
        failed = [verdict.task for verdict in verdicts if not verdict.passed]
        said = f"refused beside version {champion.number}: {', '.join(failed)}"
        tags = {"gate": said if failed else f"passed beside version {champion.number}"}
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

    def rollback(self) -> tuple[Version, Version]:
        """Make the former champion champion again; return the one that was and the one that is now.

        Raises:
            InputError: there is no champion, or none before it.
        """
        champion = self.champion()
        if champion is None or champion.former is None:
            what = "no champion" if champion is None else f"no champion before version {champion.number}"
            raise InputError(f"{self.recipe}: {what} to go back to; choose a version with promote")
        restored = self.find(champion.former)
        with connected(self.uri) as client:
            client.set_registered_model_alias(self.recipe, CHAMPION, restored.number)
        return champion, restored

    def _alias(self, alias: str) -> Version | None:
        with connected(self.uri) as client:
            found = if_there(lambda: client.get_model_version_by_alias(self.recipe, alias))
        return None if found is None else _version(found)

    def _tag(self, client: Any, version: Version, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            client.set_model_version_tag(self.recipe, version.number, key, value)


def folders_in_use(uri: str) -> dict[Path, str]:
    """Return the folder of every version that has an alias, or had it last and can have it back by `rollback`; and why.

    Versions of all recipes at the tracking URI are looked at; models that sensmerge did not register are left out.
    """
    folders = {}
    with connected(uri) as client:
        models, token = [], None
        while token != "":
            page = client.search_registered_models(page_token=token)
            models += page
            token = page.token or ""
        for model in models:
            for alias, number in model.aliases.items():
                version = client.get_model_version(model.name, str(number))
                former = version.tags.get(FORMER) if alias == CHAMPION else None
                stays = [(version, f"{alias} of {model.name}")]
                if former is not None:
                    stays.append((client.get_model_version(model.name, former), f"former {alias} of {model.name}"))
                for found, why in stays:
                    if "folder" in found.tags:
                        folders[Path(url2pathname(urlparse(found.tags["folder"]).path))] = why
    return folders


def _version(found: Any) -> Version:
    tags = found.tags
    lacking = {"variant", "digest", EVALUATED_BY} - tags.keys()
    if lacking:
        raise InputError(f"{found.name}/{found.version}: has no tag {min(lacking)}; it was not registered by sensmerge")
    return Version(
        found.name,
        str(found.version),
        tags["variant"],
        tags.get("kind"),
        tags["digest"],
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
