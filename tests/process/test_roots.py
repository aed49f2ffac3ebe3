"""`models_dir`: local models confined to folders, with real files and links.

Nothing outside of the folders may be loaded or opened, and no answer may depend on whether it is
there.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, ModelNotFound, OrchestratorError, RefusedArgument
from orchestrator.models import local
from orchestrator.models.roots import ModelRoots, model_roots
from orchestrator.models.source import ModelSource
from orchestrator.models.variants import Variant
from orchestrator.settings import flags, reach
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.models import split_gguf
from tests.kit.process.support import Make
from tests.kit.sentences import assert_sentence

SECRETS = ("secret.gguf", "deep/secret.gguf", "a.gguf")


@dataclasses.dataclass(frozen=True)
class Tree:
    """Two allowed folders, one that is not, and links in every direction."""

    base: Path
    given: Path  # a link to the first folder, as the caller gave it
    one: Path
    two: Path
    outside: Path
    roots: ModelRoots

    def populate(self) -> None:
        for name in SECRETS:
            (self.outside / name).parent.mkdir(exist_ok=True)
            (self.outside / name).write_text("GGUF")

    def depopulate(self) -> None:
        shutil.rmtree(self.outside)
        self.outside.mkdir()

    def answer(self, text: str) -> str:
        try:
            return self.roots.resolve(text, "model_path")
        except InvalidRequest as error:
            return error.message


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    base = Path(os.path.realpath(tmp_path_factory.mktemp("tree")))
    one, two, outside, given = (base / name for name in ("one", "two", "outside", "given"))
    for folder in (one / "sub" / "deep", two / "sub", outside, base / "one-and-more"):
        folder.mkdir(parents=True)
    given.symlink_to(one)
    for file in ("a.gguf", "sub/b.gguf", "sub/deep/c.gguf"):
        (one / file).write_text("GGUF")
    (two / "a.gguf").write_text("GGUF")
    (two / "only.gguf").write_text("GGUF")
    (base / "one-and-more" / "a.gguf").write_text("GGUF")
    links = {
        "in.gguf": "sub/b.gguf",
        "up": "..",
        "round": "sub/deep/../../sub",
        "to-two": str(two),
        "out": str(outside),
        "out.gguf": str(outside / "secret.gguf"),
        "chain": "out",
        "sub/back": "../../outside",
        "loop": "loop",
        "ping": "pong",
        "pong": "ping",
        "gone": str(base / "nowhere"),
        "sibling": str(base / "one-and-more"),
    }
    for name, target in links.items():
        (one / name).symlink_to(target)
    return Tree(base, given, one, two, outside, ModelRoots([given, two]))


PARTS = st.sampled_from(
    [
        *("a.gguf", "in.gguf", "sub", "deep", "b.gguf", "only.gguf", "..", ".", "", "up", "round"),
        *("to-two", "out", "out.gguf", "chain", "back", "loop", "ping", "gone", "sibling", "one"),
        *("secret.gguf", "outside", "two", "given", "one-and-more", "~", "~root", "x" * 300, " "),
    ]
)
STARTS = st.sampled_from(["", "", "/", "//", "~/", "{given}/", "{one}/", "{two}/", "{outside}/"])
PATHS = st.builds(lambda start, parts: start + "/".join(parts), STARTS, st.lists(PARTS, max_size=7))


@given(PATHS | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1))
@example("{one}/../outside/secret.gguf")
@example("out/secret.gguf")
@example("sub/back/secret.gguf")
@example("round/../../outside")
@example("{one}-and-more/a.gguf")
@settings(
    max_examples=1500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_path_leads_inside_or_is_refused(tree: Tree, text: str) -> None:
    """As CVE-2024-37032 and CVE-2024-5182 did not; and files outside change no answer."""
    for name in ("given", "one", "two", "outside"):
        text = text.replace(f"{{{name}}}", str(getattr(tree, name)))
    tree.depopulate()
    answer = tree.answer(text)
    if answer.startswith("/"):
        assert answer == os.path.realpath(answer)
        assert Path(answer).is_relative_to(tree.one) or Path(answer).is_relative_to(tree.two)
    else:
        assert_sentence("roots.outside", answer)
    tree.populate()
    assert tree.answer(text) == answer


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a.gguf", "one/a.gguf"),
        ("./sub/../a.gguf", "one/a.gguf"),
        ("only.gguf", "two/only.gguf"),
        ("neither.gguf", "one/neither.gguf"),
        ("in.gguf", "one/sub/b.gguf"),
        ("round/deep/c.gguf", "one/sub/deep/c.gguf"),
        ("to-two/only.gguf", "two/only.gguf"),
        ("{given}/a.gguf", "one/a.gguf"),
        ("{one}/sub", "one/sub"),
        (".", "one"),
        ("~root/x.gguf", "one/~root/x.gguf"),
        ("{two}/a.gguf", "two/a.gguf"),
        ("{base}/one-and-more/a.gguf", None),
        ("{base}", None),
        ("{given}/sibling/a.gguf", None),
        ("{given}/gone", None),
        ("sibling/a.gguf", "two/sibling/a.gguf"),  # the second folder has no such link
        ("..", None),
        ("up/one/a.gguf", "one/a.gguf"),
        ("/etc/passwd", None),
        ("/", None),
        ("~/a.gguf", None),
    ],
)
def test_links_inside_are_followed(tree: Tree, text: str, found: str | None) -> None:
    """And a sibling folder whose name begins alike is outside."""
    for name in ("given", "one", "two", "base"):
        text = text.replace(f"{{{name}}}", str(getattr(tree, name)))
    answer = tree.answer(text)
    assert answer == str(tree.base / found) if found else answer.startswith("model_path is outside")


def test_path_outside_by_its_text_is_never_touched(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be a slow network disk, an automount or a FIFO."""

    def touched(path: object, *_: object, **__: object) -> None:
        raise AssertionError(f"{path!r} was touched")

    for name in ("stat", "lstat", "readlink", "scandir", "open"):
        monkeypatch.setattr(os, name, touched)
    for field, path in (("model_path", f"{tree.outside}/secret.gguf"), ("mmproj_path", "../x")):
        with pytest.raises(InvalidRequest) as refused:
            local.resolve(path, field, tree.roots)
        assert refused.value.field == field
    for path in ("/etc/passwd", f"{tree.one}/../outside/x", "x"):
        with pytest.raises(RefusedArgument):
            tree.roots.check_args(["--grammar-file", path])


def test_home_is_inside_only_if_it_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    roots = ModelRoots(["~/models"])
    assert roots.resolve("~/models/x", "model_path") == str(tmp_path / "models/x")
    with pytest.raises(InvalidRequest):
        roots.resolve("~/x", "model_path")


def test_the_whole_disk_may_be_allowed() -> None:
    assert ModelRoots(["/"]).resolve("/etc/../etc", "model_path") == os.path.realpath("/etc")


def test_models_dir_that_is_not_a_folder_is_refused(tmp_path: Path) -> None:
    """A typing error must not confine to nothing, or to everything."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(InvalidRequest) as refused:
            model_roots([tmp_path, folder])
        assert refused.value.field == "models_dir"
        assert_sentence("roots.not_a_folder", refused.value.message, path=folder)


def test_models_dir_may_be_one_folder_or_several_or_none(tmp_path: Path) -> None:
    assert model_roots(()) is None
    assert model_roots(tmp_path) is not None
    assert model_roots(str(tmp_path)) is not None


# ---------------------------------------------------------------------------------- model files


@pytest.fixture
def place(tmp_path: Path, tiny_model: str) -> Callable[[str], str]:
    """Copy the tiny model to a path below the test's folder."""

    def put(name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tiny_model, path))

    return put


def found(roots: ModelRoots, path: object, **fields: Any) -> ModelFiles:
    request = LoadRequest(model_path=str(path), **fields)
    return local.locate(local.resolve(request.model_path, "model_path", roots), request, roots)


def listed(roots: ModelRoots, path: str) -> list[Variant]:
    return local.variants_of(
        local.resolve(path, "model_path", roots), LoadRequest(model_path=path), roots
    )


def test_server_gets_the_resolved_path(tmp_path: Path, place: Callable[[str], str]) -> None:
    """So it opens the file that was checked, even if a link has changed since."""
    real = place("models/sub/real.gguf")
    (tmp_path / "models" / "link.gguf").symlink_to("sub/real.gguf")
    roots = ModelRoots([tmp_path / "models"])
    for name in ("link.gguf", "sub/real.gguf", tmp_path / "models/link.gguf", "sub"):
        assert [file.path for file in found(roots, name).weights] == [real]


def test_links_out_of_a_folder_are_not_followed_wherever_they_are(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """A file, a file in a folder, a folder, a projector: with the same answer for each."""
    secret = place("secret/x-Q4_K_M.gguf")
    roots_dir = tmp_path / "models"
    (roots_dir / "folder").mkdir(parents=True)
    (roots_dir / "gone").mkdir()
    (roots_dir / "x.gguf").symlink_to(secret)
    (roots_dir / "folder" / "x-Q4_K_M.gguf").symlink_to(secret)
    (roots_dir / "gone" / "x-Q4_K_M.gguf").symlink_to(tmp_path / "secret" / "none.gguf")
    (roots_dir / "linked").symlink_to(tmp_path / "secret")
    roots = ModelRoots([roots_dir])
    problems = set()
    for name in ("x.gguf", "folder", "gone", "linked", "linked/none.gguf", "folder/x-Q4_K_M.gguf"):
        with pytest.raises(InvalidRequest) as refused:
            found(roots, name)
        problems.add(refused.value.problem)
    assert len(problems) == 1
    good = place("models/good.gguf")
    with pytest.raises(InvalidRequest) as refused:
        found(roots, good, mmproj_path="x.gguf")
    assert refused.value.field == "mmproj_path"
    assert found(roots, good).weights[0].path == good


def test_listing_has_no_file_that_is_outside(tmp_path: Path, place: Callable[[str], str]) -> None:
    """Its size would reveal that it exists."""
    roots_dir = tmp_path / "models"
    good = place("models/good-Q8_0.gguf")
    (roots_dir / "x-Q4_K_M.gguf").symlink_to(place("secret/x.gguf"))
    (roots_dir / "y-Q5_K_M.gguf").symlink_to(tmp_path / "secret" / "none.gguf")
    roots = ModelRoots([roots_dir])
    assert [(one.gguf_variant, one.size_bytes) for one in listed(roots, ".")] == [
        ("Q8_0", Path(good).stat().st_size)
    ]
    for name in ("x-Q4_K_M.gguf", "../secret"):
        with pytest.raises(InvalidRequest) as refused:
            listed(roots, name)
        assert refused.value.field == "model_path"


def test_every_part_of_a_split_model_must_be_inside(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """llama.cpp opens the other parts by their names."""
    whole = place("whole/whole.gguf")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    first, second = split_gguf(Path(whole), inside / "m")
    roots = ModelRoots([inside])
    assert len(found(roots, first).weights) == 2
    hidden = outside / second.name
    second.rename(hidden)
    with pytest.raises(ModelNotFound, match=second.name):
        found(roots, first)
    second.symlink_to(hidden)
    with pytest.raises(InvalidRequest):
        found(roots, first)
    hidden.unlink()
    with pytest.raises(InvalidRequest):
        found(roots, first)


def test_missing_path_inside_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"nothing\.gguf does not exist"):
        found(ModelRoots([tmp_path]), "nothing.gguf")


def test_repo_is_not_looked_for_in_the_working_directory(
    tmp_path: Path, place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place("cwd/owner/name/x.gguf")
    place("models/owner/other/x.gguf")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def is_local(repo: str, roots: ModelRoots | None) -> bool:
        source = ModelSource(tmp_path / "records", roots)
        return source.look_up(LoadRequest(model_path=repo)).hub is None

    roots = ModelRoots([tmp_path / "models"])
    assert is_local("owner/name", None)
    assert not is_local("owner/name", roots)
    assert is_local("owner/other", roots)


def test_repo_id_that_is_a_link_does_not_lead_outside(
    tmp_path: Path, place: Callable[[str], str], make: Make
) -> None:
    place("secret/name/x.gguf")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "owner").symlink_to(tmp_path / "secret")
    orch = make(models_dir=tmp_path / "models")
    with pytest.raises(InvalidRequest):
        orch.plan("owner/name")


def test_link_that_changes_after_the_load_is_accepted_is_checked_again(
    tmp_path: Path, place: Callable[[str], str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start may come minutes after the look-up."""
    place("models/good.gguf")
    secret = place("secret/x.gguf")
    link = tmp_path / "models" / "link.gguf"
    link.symlink_to("good.gguf")
    orch = make(models_dir=[tmp_path / "models"])
    fetch = ModelSource.fetch

    def swapped(*args: Any) -> ModelFiles:
        link.unlink()
        link.symlink_to(secret)
        return fetch(*args)

    monkeypatch.setattr(ModelSource, "fetch", swapped)
    with pytest.raises(InvalidRequest):
        orch.load("link.gguf")
    assert orch.status().state == "Idle"


# ------------------------------------------------------------------------------------- extra args


def _refuses(roots: ModelRoots, *args: str) -> bool:
    try:
        roots.check_args(args)
    except RefusedArgument as error:
        flag = flags.flag_of(args[0]) or args[0]
        return flag in error.message and error.field == "llama_extra_args"
    return False


@pytest.mark.parametrize("flag", reach.FILES.split())
def test_flag_with_a_file_accepts_only_files_inside(tree: Tree, flag: str) -> None:
    """Against SSRF and file reads by extra args (as in CVE-2024-6095)."""
    good = f"{tree.one}/a.gguf"
    assert not _refuses(tree.roots, flag, good)
    assert not _refuses(tree.roots, flag, f"{tree.given}/a.gguf")
    for bad in (
        *("/etc/passwd", "a.gguf", "../outside/secret.gguf", "~/x", "", "--top-k", "-1"),
        f"{tree.one}/../outside/secret.gguf",
        f"{tree.one}/round/../../outside",  # the kernel resolves `..` after a link differently
        f"{tree.one}/out/secret.gguf",
        f"{tree.one}/out.gguf",
        f"{tree.one}-and-more/a.gguf",
        f'"{good}"',
        f"{good},/etc/passwd",
        f"/etc/passwd,{good}",
        f"{good},",
    ):
        assert _refuses(tree.roots, flag, bad), bad
        assert _refuses(tree.roots, f"{flag}={bad}"), bad
    assert _refuses(tree.roots, flag, good, flag, "/etc/passwd")


def test_every_file_of_a_list_with_scales_is_checked(tree: Tree) -> None:
    a, b = f"{tree.one}/a.gguf", f"{tree.two}/only.gguf"
    assert not _refuses(tree.roots, "--lora", f"{a},{b}")
    assert not _refuses(tree.roots, "--lora-scaled", f"{a}:0.5,{b}:1")
    assert _refuses(tree.roots, "--lora-scaled", f"{a}:0.5,/etc/passwd:1")
    assert _refuses(tree.roots, "--control-vector-scaled", f"/etc/passwd:{a}")
    assert _refuses(tree.roots, "--lora-scaled", f"{tree.one}/out.gguf:0.5")  # a link, and no link


@pytest.mark.parametrize("flag", reach.MACHINES.split())
def test_flag_that_reaches_other_machines_is_refused(tree: Tree, flag: str) -> None:
    assert _refuses(tree.roots, flag, f"{tree.one}/a.gguf")
    assert _refuses(tree.roots, f"{flag}=x")


def test_value_of_an_unknown_flag_that_looks_like_a_path_must_be_inside(tree: Tree) -> None:
    """Flags of later releases are in no table."""
    for value in ("/etc/passwd", "~/x", "../x", "./x", "~root", " /etc/passwd"):
        assert _refuses(tree.roots, "--brand-new-file", value)
        assert _refuses(tree.roots, f"--brand_new={value}")
    harmless = ("--top-k", "20", "--temp", "-0.5", "-ot", "exps=CPU", "--samplers", "top_k;temp")
    template = ("--chat-template-kwargs", '{"path": "/etc/passwd"}', "--mlock", "-c", "4096")
    assert not _refuses(tree.roots, *harmless, *template)


@given(
    st.lists(
        st.sampled_from([*reach.FILES.split(), "--top-k", "--mlock", "20", "-1", "{in}"]),
        max_size=6,
    ),
    st.sampled_from(reach.FILES.split()),
    st.sampled_from(["/etc/passwd", "{in},/etc/passwd", "{out}", "x"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_file_outside_is_refused_whatever_args_come_before(
    tree: Tree, before: list[str], flag: str, value: str
) -> None:
    words = {"{in}": f"{tree.one}/a.gguf", "{out}": f"{tree.one}/out.gguf"}
    tokens = [*before, flag, value]
    for word, path in words.items():
        tokens = [token.replace(word, path) for token in tokens]
    with pytest.raises(RefusedArgument):
        tree.roots.check_args(tokens)


def test_extra_args_may_name_any_file_without_models_dir(make: Make, model_a: str) -> None:
    argv = make().plan(model_a, llama_extra_args=["--grammar-file", "/etc/hosts"]).argv
    assert argv[-2:] == ["--grammar-file", "/etc/hosts"]


def test_load_outside_is_refused_before_anything_is_stopped(
    tmp_path: Path, place: Callable[[str], str], make: Make
) -> None:
    place("models/a.gguf")
    orch = make(models_dir=str(tmp_path / "models"))
    running = orch.load("a.gguf")
    assert running.model_path == "a.gguf"
    for fields in (
        {"model_path": "../x.gguf"},
        {"model_path": "a.gguf", "mmproj_path": "/etc/passwd"},
        {"model_path": "a.gguf", "llama_extra_args": ["--grammar-file", "/etc/passwd"]},
    ):
        for ask in (orch.load, orch.plan, orch.prefetch):
            if ask == orch.prefetch and "llama_extra_args" in fields:
                continue
            with pytest.raises(OrchestratorError) as refused:
                ask(LoadRequest.from_dict(fields))
            assert refused.value.problem.status == 400
    assert orch.load("a.gguf").pid == running.pid
    assert orch.unload("a.gguf").status == "unloaded"
