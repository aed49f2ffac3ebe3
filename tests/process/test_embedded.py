"""The embedded server as a process, with a real model and real requests."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.demo import tiny_model
from orchestrator.server import embedded, embedded_flags
from orchestrator.settings.fields import SETTINGS
from tests.kit.process.support import Watch, until, until_it_catches

DEADLINE_S = 60.0
SCRIPT = str(Path(embedded.__file__))
USER = {"role": "user", "content": "hi"}


class Child:
    """A running embedded server."""

    def __init__(self, flags: tuple[str, ...], env: dict[str, str], **popen: Any) -> None:
        clean = {name: value for name, value in os.environ.items() if "LLAMA" not in name}
        self.process = subprocess.Popen(
            [sys.executable, "-P", SCRIPT, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=clean | env,
            **popen,
        )
        self.output: list[str] = []
        self.port = 0
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line that matches; fail with the output if there is none."""
        with contextlib.suppress(queue.Empty):
            while (line := self._lines.get(timeout=DEADLINE_S)) is not None:
                self.output.append(line)
                if found := re.search(pattern, line):
                    return found
        pytest.fail(f"no line with {pattern!r} in:\n{''.join(self.output)}")

    def listening(self) -> Child:
        self.port = int(self.wait_for(r"listening on http://127\.0\.0\.1:(\d+)$")[1])
        return self

    def request(
        self, method: str, path: str, body: object = None, key: str = ""
    ) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=DEADLINE_S)
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        try:
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: object = None) -> Any:
        status, text = self.request(method, path, body)
        assert status == 200, text
        return json.loads(text)

    def seconds_to_exit(self) -> float:
        took = Watch(self.process.pid).seconds_to_exit(time.monotonic())
        self.process.wait()
        return took

    def rest_of_output(self) -> str:
        """Wait for the exit, and return all of the output."""
        self.process.wait(DEADLINE_S)
        while (line := self._lines.get(timeout=DEADLINE_S)) is not None:
            self.output.append(line)
        return "".join(self.output)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


Start = Callable[..., Child]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.write_tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf"))


@pytest.fixture
def start(model: str) -> Iterator[Start]:
    """Start children on a free port with the tiny model, and end them after the test."""
    children: list[Child] = []

    def begin(*flags: str, env: dict[str, str] | None = None, **popen: Any) -> Child:
        children.append(Child(("-m", model, "--port", "0", *flags), env or {}, **popen))
        return children[-1]

    yield begin
    for child in children:
        child.close()


def run(*flags: str, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command line that is not expected to serve."""
    command = [sys.executable, "-P", *python, SCRIPT, *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


# The command line


@pytest.mark.parametrize("flag", ["--bogus", "--ctx-size=5", "-np8", "stray"])
def test_an_unknown_flag_is_refused_in_llama_servers_words(flag: str) -> None:
    """Failures are classified by this text. It is printed before any library is loaded."""
    no_site_packages = ("-S",)
    ended = run(flag, python=no_site_packages)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == f"error: invalid argument: {flag}\n"


@pytest.mark.parametrize(
    ("flags", "refusal"),
    [
        (("-c",), 'handling argument "-c": expected value for argument'),
        (("-c", "abc"), 'handling argument "-c": stoi'),
        (("--ctx_size", "99999999999"), 'handling argument "--ctx-size": stoi'),
        (("-c", "-1"), 'handling argument "-c": size must be between 0'),
        (("--port", "70000"), 'handling argument "--port": port must be between 0'),
        (("-s", "abc"), 'handling argument "-s": stoul'),
        (("--temp", "abc"), 'handling argument "--temp": stof'),
        (("--temp", "nan"), 'handling argument "--temp": stof'),
        (("--repeat-penalty", "-1"), "error: repeat-penalty must be finite and greater than 0"),
        (("-np", "0"), "error: invalid value for n_parallel"),
        (("-ngl", "some"), 'handling argument "-ngl": stoi'),
        (("-ctk", "q9"), "Unsupported cache type: q9"),
        (("-fa", "maybe"), "error: unknown value for --flash-attn: 'maybe'"),
        (("-lm", "slow"), 'handling argument "-lm": invalid value'),
        (("--spec-type", "ngram-mod,x"), "unknown speculative type: x"),
        (("--spec-ngram-mod-n-match", "5000"), "ngram size N must be between 1 and 1024"),
        (("--chat-template-file", "/nowhere"), "error: failed to open file '/nowhere'"),
        (("--chat-template-kwargs", "{bad"), "parse error"),
        (("--chat-template-kwargs", "[1]"), "parse error: not a JSON object"),
        (("--host", ","), "--host requires at least one address"),
    ],
)
def test_an_invalid_value_is_refused_with_the_usage_of_its_flag(
    flags: tuple[str, ...], refusal: str
) -> None:

    ended = run("-m", "model.gguf", *flags)
    assert ended.returncode == 1
    assert refusal in ended.stderr
    assert re.search(rf"\nusage:\n.*{flags[0].replace('_', '-')}", ended.stderr)
    assert ended.stderr.endswith("\nto show complete usage, run with -h\n")


@pytest.mark.parametrize("flags", [(), ("--port", "0"), ("-m", "")])
def test_a_command_line_without_a_model_is_refused(flags: tuple[str, ...]) -> None:
    """llama-server would start in router mode and spawn children of its own."""
    ended = run(*flags)
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: --model is required")


HELP_AS_LLAMA_SERVER_WRITES_IT = """\
-h,    --help, --usage                  print usage and exit
--version                               show version and build info
-c,    --ctx-size N                     size of the prompt context (default: 0, 0 = loaded from model)
-fa,   --flash-attn [on|off|auto]       set Flash Attention use ('on', 'off', or 'auto', default: 'auto')
-ctk,  --cache-type-k TYPE              KV cache data type for K
                                        allowed values: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
                                        (default: f16)
--spec-type none,draft-simple,draft-eagle3,draft-mtp,draft-dflash,draft-dspark,ngram-simple,ngram-map-k,ngram-map-k4v,ngram-mod,ngram-cache
                                        comma-separated list of types of speculative decoding to use (default:
                                        none)
-np,   --parallel N                     number of server slots (default: -1, -1 = auto)
--spec-default                          enable default speculative decoding config
"""  # noqa: E501


def test_the_flags_of_every_setting_are_known() -> None:
    """`KIND` stands for each of its choices; the default needs no flag."""
    for row in SETTINGS.values():
        others = [choice for choice in row.choices if choice != row.default]
        written = [row.argv.replace("--{}", f"--{choice}") for choice in others or [""]]
        flags = {word for text in written for word in text.split() if word.startswith("-")}
        assert flags <= embedded_flags.BY_NAME.keys(), flags - embedded_flags.BY_NAME.keys()


def test_help_lists_every_flag_in_llama_servers_layout() -> None:
    """What parses the real `--help` can parse this one."""
    ended = run("--help", python=("-S",))
    assert (ended.returncode, ended.stderr) == (0, "")
    lines = ended.stdout.splitlines()
    assert [line for line in HELP_AS_LLAMA_SERVER_WRITES_IT.splitlines() if line not in lines] == []
    listed = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", ended.stdout))
    flags = [flag for rows in embedded_flags.FLAGS.values() for flag in rows]
    assert {name for flag in flags for name in flag.spellings()} <= listed


def test_the_listed_speculative_types_are_those_the_library_knows() -> None:
    import xllamacpp

    known = xllamacpp.common_speculative_type.__members__
    names = [name.removeprefix("COMMON_SPECULATIVE_TYPE_").lower() for name in known]
    row = next(
        flag for flag in embedded_flags.FLAGS["speculative params"] if flag.names == "--spec-type"
    )
    assert [*row.value.replace("-", "_").split(","), "count"] == names


def test_version_names_the_library() -> None:
    ended = run("--version")
    assert ended.returncode == 0
    assert re.match(r"version: \d{4}\.\S+ \(xllamacpp\)\nbuilt for ", ended.stderr)


def test_a_missing_library_is_reported_with_the_extra_to_install(model: str) -> None:
    ended = run("-m", model, python=("-S",))
    assert ended.returncode == 1
    assert 'pip install "llama-orchestrator[embedded]"' in ended.stderr


# Serving


def test_it_prints_its_address_and_answers_requests(start: Start) -> None:
    child = start().listening()
    assert child.json("GET", "/health") == {"status": "ok"}
    answer = child.json("POST", "/v1/chat/completions", {"messages": [USER], "max_tokens": 12})
    text = answer["choices"][0]["message"]["content"]
    assert len(text) == 12
    assert text.isascii()
    assert text.isprintable()


@pytest.mark.parametrize("content", [None, b"", b"GGUF", b"not a model at all"])
def test_an_unusable_model_ends_it_with_llama_cpps_reason(
    start: Start, tmp_path: Path, content: bytes | None
) -> None:
    broken = tmp_path / "broken.gguf"
    if content is not None:
        broken.write_bytes(content)
    child = start("-m", str(broken))
    output = child.rest_of_output()
    assert child.process.returncode == 1
    assert f"failed to load model, '{broken}'" in output
    assert "exiting due to model loading error" in output


def test_it_exits_when_its_port_is_in_use(start: Start) -> None:
    """`/health` on that port answers 200, because the first server does."""
    first = start().listening()
    second = start("--port", str(first.port))
    output = second.rest_of_output()
    assert second.process.returncode == 1
    assert f"couldn't bind HTTP server socket, hostname: 127.0.0.1, port: {first.port}" in output
    assert first.json("GET", "/health") == {"status": "ok"}


# Effects of the flags


def settings(child: Child) -> dict[str, Any]:
    """Return the settings the server reports, including the sampling parameters."""
    props: dict[str, Any] = child.json("GET", "/props")
    return {**props, **props["default_generation_settings"]["params"]}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", {"total_slots": 4, "temperature": 0.8, "top_k": 40, "endpoint_metrics": False}),
        ("-np 2", {"total_slots": 2}),
        ("--parallel 3", {"total_slots": 3}),
        ("-a one,two", {"model_alias": "one"}),
        ("-s 42", {"seed": 42}),
        ("-s -1", {"seed": 2**32 - 1}),
        ("--temp 0.25", {"temperature": 0.25}),
        ("--temperature 2", {"temperature": 2}),
        ("--top-k 7", {"top_k": 7}),
        ("--top-p 0.5", {"top_p": 0.5}),
        ("--min-p 0.25", {"min_p": 0.25}),
        ("--repeat-penalty 1.5", {"repeat_penalty": 1.5}),
        ("--repeat-last-n 9", {"repeat_last_n": 9}),
        ("--presence-penalty 0.5", {"presence_penalty": 0.5}),
        ("--frequency-penalty 0.75", {"frequency_penalty": 0.75}),
        ("--metrics", {"endpoint_metrics": True}),
        ("--props", {"endpoint_props": True}),
        ("--no-slots", {"endpoint_slots": False}),
        ("--no-slots --slots", {"endpoint_slots": True}),
    ],
)
def test_a_flag_changes_what_the_server_reports(
    start: Start, flags: str, expected: dict[str, Any]
) -> None:
    running = settings(start(*flags.split()).listening())
    assert {name: running[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flags", "expected"), [("-c 512", 512), ("-c 1024 -np 2", 512), ("-c 0 -np 1", 2048)]
)
def test_the_context_is_shared_among_the_slots(start: Start, flags: str, expected: int) -> None:
    child = start(*flags.split()).listening()
    assert {slot["n_ctx"] for slot in child.json("GET", "/slots")} == {expected}


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("-ctk q8_0 -ctv q4_0", r"K \(q8_0\):.* V \(q4_0\)"),
        ("-fa off", r"flash_attn += disabled"),
        ("-fa on", r"flash_attn += enabled"),
        ("-t 1 -tb 3", r"n_threads = 1 \(n_threads_batch = 3\)"),
        ("-t 3", r"n_threads = 3 \(n_threads_batch = 3\)"),
        ("-b 64", r"n_batch += 64"),
        ("-ub 32", r"n_ubatch += 32"),
        ("-lm dio", r"load_mode = dio"),
        ("--mlock", r"load_mode = mmap\+mlock"),
        ("--mlock --no-mmap", r"load_mode = mlock"),
        ("--no-mmap", r" CPU model buffer size"),
        ("--mmap", r"load_mode = mmap\)"),
        ("--spec-default", r"n_match=24, n_max=64, n_min=48"),
        ("--spec-type ngram-simple --spec-default", r"implementation 'ngram-mod'"),
        ("--spec-default --spec-type ngram-simple", r"implementation 'ngram-simple'"),
        ("--spec-type none,ngram-mod", r"no implementations specified for speculative"),
        (
            "--spec-ngram-mod-n-match 20 --spec-ngram-mod-n-max 9 --spec-type ngram-mod",
            r"n_match=20, n_max=9, n_min=48",
        ),
        (
            "--spec-type ngram-mod --spec-ngram-mod-n-min 3",
            r"n_match=24, n_max=64, n_min=3",
        ),
        ("--no-jinja", r"this custom template is not supported, try using --jinja"),
        ("-mm /nowhere/mmproj.gguf", r"failed to load multimodal model, '/nowhere/mmproj.gguf'"),
    ],
)
def test_a_flag_changes_what_llama_cpp_logs(start: Start, flags: str, line: str) -> None:
    """With `-v` it logs what no endpoint reports."""
    start("-v", *flags.split()).wait_for(line)


def test_the_number_of_tokens_is_limited(start: Start) -> None:
    """For requests without a limit of their own."""
    child = start("-n", "7").listening()
    answer = child.json("POST", "/v1/chat/completions", {"messages": [USER]})
    assert answer["usage"]["completion_tokens"] == 7


def test_a_draft_model_is_loaded_with_its_limits(start: Start, model: str) -> None:
    child = start(
        *("-v", "--spec-type", "draft-simple", "-md", model, "--spec-draft-n-max", "7"),
        *("--spec-draft-n-min", "2", "--spec-draft-p-min", "0.25"),
    )
    child.wait_for(r"implementation 'draft-simple'")
    child.wait_for(r"n_max=7, n_min=2, p_min=0.25")


@pytest.mark.parametrize(
    ("flag", "line"), [("--no-warmup", "warming up the model"), ("--fit off", "fitting params")]
)
def test_a_flag_switches_a_default_off(start: Start, flag: str, line: str) -> None:
    start("-v").wait_for(line)
    child = start("-v", *flag.split())
    child.listening()
    assert not any(line in written for written in child.output)


def test_requests_take_turns_without_continuous_batching(start: Start) -> None:
    """With `-nocb` the second answer comes after the first is complete."""
    child = start("-nocb", "-np", "2", "-c", "8192").listening()
    long_one = threading.Thread(
        target=child.json, args=("POST", "/completion", {"prompt": "hi", "n_predict": 800})
    )
    long_one.start()
    until(lambda: busy_slots(child), "the first request")
    child.json("POST", "/completion", {"prompt": "hi", "n_predict": 3})
    assert busy_slots(child) == 0
    long_one.join(DEADLINE_S)


def busy_slots(child: Child) -> int:
    return sum(slot["is_processing"] for slot in child.json("GET", "/slots"))


def test_the_chat_template_and_its_arguments_determine_the_prompt(
    start: Start, tmp_path: Path
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("file {{ messages[0].content }} {{ word }}")
    flags = ("--chat-template-kwargs", '{"word": "wörd", "more": [1]}', "--jinja")
    from_file = start("--chat-template-file", str(template), *flags).listening()
    inline = start("--chat-template", "inline {{ messages[0].content }}").listening()
    prompts = [
        child.json("POST", "/apply-template", {"messages": [USER]})["prompt"]
        for child in (from_file, inline)
    ]
    assert prompts == ["file hi wörd", "inline hi"]


def test_sampling_flags_win_over_the_models_own_settings(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a flag with llama.cpp's default value."""
    add_metadata = tiny_model._add_metadata

    def with_sampling(writer: Any, *rest: Any) -> None:
        add_metadata(writer, *rest)
        writer.add_float32("general.sampling.temp", 0.25)
        writer.add_int32("general.sampling.top_k", 11)

    monkeypatch.setattr(tiny_model, "_add_metadata", with_sampling)
    opinionated = str(tiny_model.write_tiny_model(tmp_path / "opinionated.gguf"))
    plain, flagged = (
        settings(start("-m", opinionated, *flags).listening()) for flags in ((), ("--top-k", "40"))
    )
    assert (plain["temperature"], plain["top_k"]) == (0.25, 11)
    assert (flagged["temperature"], flagged["top_k"]) == (0.25, 40)


def test_layers_for_a_missing_gpu_are_reported(start: Start) -> None:
    import xllamacpp

    if any(device["type"].name.endswith("GPU") for device in xllamacpp.get_device_info()):
        start("-v", "-ngl", "0").wait_for(r"offloaded 0/")
    else:
        start("-ngl", "all").wait_for(r"no usable GPU found, --gpu-layers option will be ignored")


# Keys


def test_api_keys_from_file_and_environment_are_enforced(start: Start, tmp_path: Path) -> None:
    """All users of the machine can read argv."""
    keys = tmp_path / "keys"
    keys.write_text("# comment\n\nfrom-file\n")
    child = start("--api-key-file", str(keys), env={"LLAMA_API_KEY": "from-env"}).listening()
    asked = {key: child.request("GET", "/props", key=key)[0] for key in ("", "wrong", "# comment")}
    assert asked == {"": 401, "wrong": 401, "# comment": 401}
    assert [child.request("GET", "/props", key=f"from-{k}")[0] for k in ("file", "env")] == [
        200,
        200,
    ]
    assert child.request("GET", "/health")[0] == 200


@pytest.mark.parametrize("content", ["", "\n\n# only a comment\n"])
def test_a_key_file_without_a_key_is_refused(tmp_path: Path, content: str) -> None:
    """llama-server then requires no key."""
    keys = tmp_path / "keys"
    keys.write_text(content)
    ended = run("-m", "model.gguf", "--api-key-file", str(keys))
    assert ended.returncode == 1
    assert f"no API key in file '{keys}'" in ended.stderr


# Stopping


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_server_at_once(start: Start, signum: signal.Signals) -> None:
    """A swap of models waits for it. An open connection must not delay it."""
    child = start().listening()
    until_it_catches(child.process.pid, signum)
    idle = http.client.HTTPConnection("127.0.0.1", child.port, timeout=DEADLINE_S)
    idle.request("GET", "/health")
    assert idle.getresponse().read() == b'{"status":"ok"}'
    child.process.send_signal(signum)
    assert child.seconds_to_exit() < 5
    assert child.process.returncode == 0
    idle.close()


def test_a_signal_ends_a_server_that_is_streaming(start: Start) -> None:
    """llama-server may ignore the first SIGTERM while a client reads."""
    child = start("-c", "60000").listening()
    until_it_catches(child.process.pid, signal.SIGTERM)
    stream = http.client.HTTPConnection("127.0.0.1", child.port, timeout=DEADLINE_S)
    body = json.dumps({"prompt": "hi", "n_predict": 50_000, "stream": True})
    stream.request("POST", "/completion", body, {"Content-Type": "application/json"})
    assert stream.getresponse().read(20).startswith(b"data: ")
    child.process.send_signal(signal.SIGTERM)
    assert child.seconds_to_exit() < 5
    assert child.process.returncode == 0
    stream.close()


def test_a_signal_ends_a_server_that_is_loading(start: Start, tmp_path: Path) -> None:
    """The library holds the GIL while it loads, so no Python handler would run."""
    large = tiny_model.write_tiny_model(tmp_path / "large.gguf", padding_bytes=256 << 20)
    child = start("-m", str(large), "--no-mmap")
    child.wait_for("loading model")
    child.process.send_signal(signal.SIGTERM)
    assert child.seconds_to_exit() < 5
    assert child.process.returncode == -signal.SIGTERM
    assert "listening" not in child.rest_of_output()


# The tiny model


def test_the_same_seed_writes_the_same_model(tmp_path: Path) -> None:
    """So a benchmark or a bug report can describe a file by its arguments."""
    paths = [tmp_path / name for name in ("a", "b", "c")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        assert tiny_model.write_tiny_model(path, seed=seed) == path
    first, again, other = (path.read_bytes() for path in paths)
    assert first == again != other
    assert len(first) < 600_000
    assert sorted(tmp_path.iterdir()) == paths


@pytest.mark.parametrize("padding_bytes", [1, 1 << 20, 64 << 20])
def test_a_padded_model_is_larger_and_still_answers(
    start: Start, model: str, tmp_path: Path, padding_bytes: int
) -> None:
    """Tests of slow loads need files of any size that llama.cpp really reads."""
    padded = tiny_model.write_tiny_model(tmp_path / "padded.gguf", padding_bytes=padding_bytes)
    assert padded.stat().st_size >= Path(model).stat().st_size + padding_bytes
    child = start("-m", str(padded)).listening()
    answer = child.json("POST", "/v1/chat/completions", {"messages": [USER], "max_tokens": 5})
    assert len(answer["choices"][0]["message"]["content"]) == 5


def test_layers_and_context_are_as_requested(start: Start, tmp_path: Path) -> None:
    path = tiny_model.write_tiny_model(tmp_path / "m.gguf", n_layer=5, context_length=4096)
    child = start("-v", "-m", str(path))
    child.wait_for(r"n_layer\s+= 5")
    [entry] = child.listening().json("GET", "/v1/models")["data"]
    assert entry["meta"]["n_ctx_train"] == 4096


@pytest.mark.parametrize("size", [{"n_layer": 0}, {"padding_bytes": -1}, {"context_length": 0}])
def test_an_invalid_size_writes_nothing(tmp_path: Path, size: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        tiny_model.write_tiny_model(tmp_path / "m.gguf", **size)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_gguf_package_is_reported_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "llama-orchestrator\[demo\]"'):
        tiny_model.write_tiny_model(tmp_path / "m.gguf")
