"""Models confined to folders: real files and links, and every name somebody could think of.

`models_dir` is what stands between a caller and the files of this machine, so nothing outside may
be loaded, opened, or even told to exist.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequest, ModelNotFound, OrchestratorError, RefusedArgument
from orchestrator.models import local
from orchestrator.models.local import is_local, locate
from orchestrator.models.roots import ModelRoots, model_roots
from orchestrator.models.source import ModelSource
from orchestrator.settings import flags
from orchestrator.settings.fields import check_extra_args
from orchestrator.settings.files import ModelFiles
from orchestrator.settings.request import LoadRequest
from tests.kit.models import split_gguf
from tests.kit.process.support import Make

SECRETS = ("secret.gguf", "deep/secret.gguf", "a.gguf")


@dataclasses.dataclass(frozen=True)
class Tree:
    """Two allowed folders, one that is not, and links in every direction.

    Attributes:
        called: A link to the first folder, by which it was named.
    """

    base: Path
    called: Path
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
    one, two, outside, called = (base / name for name in ("one", "two", "outside", "called"))
    for folder in (one / "sub" / "deep", two / "sub", outside, base / "one-and-more"):
        folder.mkdir(parents=True)
    called.symlink_to(one)
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
    return Tree(base, called, one, two, outside, ModelRoots([called, two]))


PARTS = st.sampled_from(
    [
        *("a.gguf", "in.gguf", "sub", "deep", "b.gguf", "only.gguf", "..", ".", "", "up", "round"),
        *("to-two", "out", "out.gguf", "chain", "back", "loop", "ping", "gone", "sibling", "one"),
        *("secret.gguf", "outside", "two", "called", "one-and-more", "~", "~root", "x" * 300, " "),
    ]
)
STARTS = st.sampled_from(["", "", "/", "//", "~/", "{called}/", "{one}/", "{two}/", "{outside}/"])
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
def test_whatever_the_name_it_leads_inside_or_nowhere(tree: Tree, text: str) -> None:
    """CVE-2024-37032 and CVE-2024-5182 in peers. And what is outside changes no answer."""
    for name in ("called", "one", "two", "outside"):
        text = text.replace(f"{{{name}}}", str(getattr(tree, name)))
    tree.depopulate()
    answer = tree.answer(text)
    if answer.startswith("/"):
        assert answer == os.path.realpath(answer)
        assert Path(answer).is_relative_to(tree.one) or Path(answer).is_relative_to(tree.two)
    else:
        assert answer.startswith("model_path is outside of the allowed model folders")
        assert str(tree.base) not in answer
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
        ("{called}/a.gguf", "one/a.gguf"),
        ("{one}/sub", "one/sub"),
        (".", "one"),
        ("~root/x.gguf", "one/~root/x.gguf"),
        ("{two}/a.gguf", "two/a.gguf"),
        ("{base}/one-and-more/a.gguf", None),
        ("{base}", None),
        ("{called}/sibling/a.gguf", None),
        ("{called}/gone", None),
        ("sibling/a.gguf", "two/sibling/a.gguf"),  # the second folder has no such link
        ("..", None),
        ("up/one/a.gguf", "one/a.gguf"),
        ("/etc/passwd", None),
        ("/", None),
        ("~/a.gguf", None),
    ],
)
def test_where_names_lead(tree: Tree, text: str, found: str | None) -> None:
    """Links inside are followed; a sibling with a longer name is not inside."""
    for name in ("called", "one", "two", "base"):
        text = text.replace(f"{{{name}}}", str(getattr(tree, name)))
    answer = tree.answer(text)
    assert answer == str(tree.base / found) if found else answer.startswith("model_path is outside")


def test_nothing_is_looked_at_that_is_outside_by_its_name(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow network disk, an automount, or a FIFO somewhere else must not be touched at all."""

    def touched(path: object, *_: object, **__: object) -> None:
        raise AssertionError(f"looked at {path!r}")

    for name in ("stat", "lstat", "readlink", "scandir", "open"):
        monkeypatch.setattr(os, name, touched)
    request = LoadRequest(model_path=f"{tree.outside}/secret.gguf", mmproj_path="../x")
    for ask in (lambda: locate(request, tree.roots), lambda: is_local("../x", tree.roots)):
        with pytest.raises(InvalidRequest, match="model_path is outside"):
            ask()
    with pytest.raises(InvalidRequest, match="mmproj_path is outside"):
        local.given_projector(request, tree.roots)
    for path in ("/etc/passwd", f"{tree.one}/../outside/x", "x"):
        with pytest.raises(RefusedArgument):
            tree.roots.check_args(["--grammar-file", path])


def test_a_home_is_inside_only_when_it_is_allowed(
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


@pytest.mark.parametrize("folder", ["nowhere", "file", ""])
def test_a_folder_that_is_none_is_refused(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistyped one must not confine to nothing, or to everything."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    if folder:
        with pytest.raises(InvalidRequest) as refused:
            model_roots([tmp_path, folder])
        assert refused.value.field == "models_dir"
    assert model_roots(()) is None
    assert model_roots(tmp_path) is not None
    assert model_roots(str(tmp_path)) is not None


# -------------------------------------------------------------------------------------- the files


@pytest.fixture
def place(tmp_path: Path, tiny_model: str) -> Callable[[str], str]:
    """Put the tiny model somewhere below the test's folder."""

    def put(name: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(tiny_model, path))

    return put


def found(roots: ModelRoots, path: object, **fields: Any) -> ModelFiles:
    return locate(LoadRequest(model_path=str(path), **fields), roots)


def test_the_path_that_is_handed_over_is_the_resolved_one(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """What was checked is what the server opens, also when a link is changed meanwhile."""
    real = place("models/sub/real.gguf")
    (tmp_path / "models" / "link.gguf").symlink_to("sub/real.gguf")
    roots = ModelRoots([tmp_path / "models"])
    for name in ("link.gguf", "sub/real.gguf", tmp_path / "models/link.gguf", "sub"):
        assert [file.path for file in found(roots, name).weights] == [real]


def test_links_out_of_a_folder_are_not_followed_wherever_they_are(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """A file, a file that a folder offers, a folder, a projector: and none tells what is there."""
    secret = place("secret/x-Q4_K_M.gguf")
    roots_dir = tmp_path / "models"
    (roots_dir / "folder").mkdir(parents=True)
    (roots_dir / "gone").mkdir()
    (roots_dir / "x.gguf").symlink_to(secret)
    (roots_dir / "folder" / "x-Q4_K_M.gguf").symlink_to(secret)
    (roots_dir / "gone" / "x-Q4_K_M.gguf").symlink_to(tmp_path / "secret" / "none.gguf")
    (roots_dir / "linked").symlink_to(tmp_path / "secret")
    roots = ModelRoots([roots_dir])
    said = set()
    for name in ("x.gguf", "folder", "gone", "linked", "linked/none.gguf", "folder/x-Q4_K_M.gguf"):
        with pytest.raises(InvalidRequest) as refused:
            found(roots, name)
        said.add(refused.value.problem)
    assert len(said) == 1
    good = place("models/good.gguf")
    with pytest.raises(InvalidRequest) as refused:
        found(roots, good, mmproj_path="x.gguf")
    assert refused.value.field == "mmproj_path"
    assert found(roots, good).weights[0].path == good


def test_a_listing_shows_nothing_that_is_outside(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """Not even that it is there: its size would tell."""
    roots_dir = tmp_path / "models"
    good = place("models/good-Q8_0.gguf")
    (roots_dir / "x-Q4_K_M.gguf").symlink_to(place("secret/x.gguf"))
    (roots_dir / "y-Q5_K_M.gguf").symlink_to(tmp_path / "secret" / "none.gguf")
    listed = local.variants_of(LoadRequest(model_path="."), ModelRoots([roots_dir]))
    assert [(one.gguf_variant, one.size_bytes) for one in listed] == [
        ("Q8_0", Path(good).stat().st_size)
    ]
    for name in ("x-Q4_K_M.gguf", "../secret"):
        with pytest.raises(InvalidRequest, match="outside of the allowed"):
            local.variants_of(LoadRequest(model_path=name), ModelRoots([roots_dir]))


def test_every_part_of_a_split_model_has_to_be_inside(
    tmp_path: Path, place: Callable[[str], str]
) -> None:
    """llama.cpp opens the others by itself, by their names."""
    whole = place("whole/whole.gguf")
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
    first, second = split_gguf(Path(whole), inside / "m")
    roots = ModelRoots([inside])
    assert len(found(roots, first).weights) == 2
    hidden = outside / second.name
    second.rename(hidden)
    with pytest.raises(ModelNotFound, match="is missing beside it"):
        found(roots, first)
    second.symlink_to(hidden)
    with pytest.raises(InvalidRequest, match="outside of the allowed"):
        found(roots, first)
    hidden.unlink()
    with pytest.raises(InvalidRequest, match="outside of the allowed"):
        found(roots, first)


def test_a_name_inside_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    roots = ModelRoots([tmp_path])
    with pytest.raises(ModelNotFound, match=r"nothing\.gguf does not exist"):
        found(roots, "nothing.gguf")
    assert not is_local("owner/name", roots)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert is_local("owner/name", roots)


def test_the_working_folder_means_nothing(
    tmp_path: Path, place: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hub id that is a folder of the host's working directory stays a Hub id."""
    place("cwd/owner/name/x.gguf")
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    assert is_local("owner/name")
    assert not is_local("owner/name", ModelRoots([tmp_path / "models"]))


def test_a_hub_id_that_is_a_link_does_not_lead_out(
    tmp_path: Path, place: Callable[[str], str], make: Make
) -> None:
    place("secret/name/x.gguf")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "owner").symlink_to(tmp_path / "secret")
    orch = make(models_dir=tmp_path / "models")
    with pytest.raises(InvalidRequest, match="outside of the allowed"):
        orch.plan("owner/name")


def test_a_link_changed_after_the_load_was_accepted_is_looked_at_again(
    tmp_path: Path, place: Callable[[str], str], make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the start lie a kill and maybe minutes of a queue."""
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
    with pytest.raises(InvalidRequest, match="outside of the allowed"):
        orch.load("link.gguf")
    assert orch.status().state == "Idle"


# --------------------------------------------------------------------------------- the extra args


def _refuses(roots: ModelRoots, *args: str) -> bool:
    try:
        roots.check_args(args)
    except RefusedArgument as error:
        flag = flags.flag_of(args[0]) or args[0]
        return flag in error.message and error.field == "llama_extra_args"
    return False


@pytest.mark.parametrize("flag", flags.FILES.split())
def test_a_flag_that_names_a_file_names_one_inside(tree: Tree, flag: str) -> None:
    """SSRF and file reads by extra args (CVE-2024-6095 in a peer)."""
    good = f"{tree.one}/a.gguf"
    assert not _refuses(tree.roots, flag, good)
    assert not _refuses(tree.roots, flag, f"{tree.called}/a.gguf")
    for bad in (
        *("/etc/passwd", "a.gguf", "../outside/secret.gguf", "~/x", "", "--top-k", "-1"),
        f"{tree.one}/../outside/secret.gguf",
        f"{tree.one}/round/../../outside",  # `..` behind a link means something else to the kernel
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


def test_scales_and_lists_are_understood(tree: Tree) -> None:
    a, b = f"{tree.one}/a.gguf", f"{tree.two}/only.gguf"
    assert not _refuses(tree.roots, "--lora", f"{a},{b}")
    assert not _refuses(tree.roots, "--lora-scaled", f"{a}:0.5,{b}:1")
    assert _refuses(tree.roots, "--lora-scaled", f"{a}:0.5,/etc/passwd:1")
    assert _refuses(tree.roots, "--control-vector-scaled", f"/etc/passwd:{a}")
    assert _refuses(tree.roots, "--lora-scaled", f"{tree.one}/out.gguf:0.5")  # a link, and no link


@pytest.mark.parametrize("flag", flags.REACHING.split())
def test_a_flag_that_reaches_further_is_refused(tree: Tree, flag: str) -> None:
    assert _refuses(tree.roots, flag, f"{tree.one}/a.gguf")
    assert _refuses(tree.roots, f"{flag}=x")


def test_a_flag_of_tomorrow_names_no_file_outside_either(tree: Tree) -> None:
    """Whatever looks like a path is one; what does not is nobody's business."""
    for value in ("/etc/passwd", "~/x", "../x", "./x", "~root", " /etc/passwd"):
        assert _refuses(tree.roots, "--brand-new-file", value)
        assert _refuses(tree.roots, f"--brand_new={value}")
    harmless = ("--top-k", "20", "--temp", "-0.5", "-ot", "exps=CPU", "--samplers", "top_k;temp")
    template = ("--chat-template-kwargs", '{"path": "/etc/passwd"}', "--mlock", "-c", "4096")
    assert not _refuses(tree.roots, *harmless, *template)


@given(
    st.lists(
        st.sampled_from([*flags.FILES.split(), "--top-k", "--mlock", "20", "-1", "{in}"]),
        max_size=6,
    ),
    st.sampled_from(flags.FILES.split()),
    st.sampled_from(["/etc/passwd", "{in},/etc/passwd", "{out}", "x"]),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_before_a_flag_hides_it(
    tree: Tree, before: list[str], flag: str, value: str
) -> None:
    """A flag may be taken for the value of one before it: then that one is refused."""
    words = {"{in}": f"{tree.one}/a.gguf", "{out}": f"{tree.one}/out.gguf"}
    tokens = [*before, flag, value]
    for word, path in words.items():
        tokens = [token.replace(word, path) for token in tokens]
    with pytest.raises(RefusedArgument):
        tree.roots.check_args(tokens)


def test_without_folders_extra_args_are_as_ever(make: Make, model_a: str) -> None:
    """`--lora` somewhere is the owner's own business."""
    argv = make().plan(model_a, llama_extra_args=["--grammar-file", "/nowhere.gbnf"]).argv
    assert argv[-2:] == ["--grammar-file", "/nowhere.gbnf"]


def test_a_load_is_refused_before_anything_is_stopped(
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


HINT = re.compile(r"FNAME|FILE|PATH|\bDIR\b|SERVERS|URL|<user>", re.IGNORECASE)


def _flags_with_paths(llama_server: str) -> Iterator[str]:
    """Every spelling of a flag whose value is a file or an address, by the binary's own help."""
    text = subprocess.run(
        [llama_server, "--help"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("-----"):
            names = re.findall(r"(?:^|[\s,])(--?[A-Za-z][\w.-]*)", line[:200])
            hint = re.split(r"\s{2,}", line.rsplit(names[-1], 1)[-1].strip())[0]
            if HINT.search(hint):
                yield from names


@pytest.mark.external
def test_every_flag_of_the_real_server_that_takes_a_file_is_known(llama_server: str) -> None:
    """A new one shows up here, by the help's own words for a value."""
    known = {*flags.FILES.split(), *flags.REACHING.split()}
    named = list(_flags_with_paths(llama_server))
    assert len(named) > 20
    for flag in named:
        try:
            check_extra_args((flag, "x"))
        except RefusedArgument:
            continue
        assert flag in known, flag
