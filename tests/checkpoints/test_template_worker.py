"""Guards minia3/checkpoints/template_worker.py: whatever a chat template does, it ends soon, in one
line, and the next template works."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from minia3.checkpoints import chat, template_worker
from minia3.checkpoints.chat import render_chat

pytest.importorskip("jinja2", reason="needs the extra: pip install 'minia3[chat]'")

MESSAGES = [{"role": "user", "content": "Hello"}]
DOUBLING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}STEP{% endfor %}"


def doubling(start, step):
    """Return a template that runs a step 60 times."""
    return DOUBLING.replace("START", start).replace("STEP", step)


# What a template cannot do, because no real template does it: a word of the message
REFUSED = {
    "{{ '{:>9999999999}'.format('a') }}": "'format'",
    "{{ '{0.__class__}'.format(messages) }}": "'format'",
    "{{ '{a:>999999999}'.format_map({'a': 1}) }}": "'format_map'",
    "{{ '%999999999d' | format(1) }}": "No filter named 'format'",
    "{{ '%999999999d' % 1 }}": "only for numbers",
    "{{ 'a' * 10**10 }}": "only for numbers",
    "{{ 10**10 * 'a' }}": "only for numbers",
    "{{ 'a' * 10000000000 }}": "only for numbers",
    "{{ [0] * 10000000000 }}": "only for numbers",
    "{{ 9**9**9**9 }}": "only for numbers",
    "{{ 'a'.ljust(10000000000) }}": "'ljust'",
    "{{ 'a'.rjust(10000000000) }}": "'rjust'",
    "{{ 'a'.center(10000000000) }}": "'center'",
    "{{ 'a'.zfill(10000000000) }}": "'zfill'",
    "{{ '\t'.expandtabs(10000000000) }}": "'expandtabs'",
    "{{ 'a'.translate({97: 'b'}) }}": "'translate'",
    "{{ 'a'.encode() }}": "'encode'",
    "{{ 'a' | center(10**10) }}": "No filter named 'center'",
    "{{ 'a' | wordwrap(1, wrapstring='x') }}": "No filter named 'wordwrap'",
    "{{ 'a' | xmlattr }}": "No filter named 'xmlattr'",
    "{{ [1] | random }}": "No filter named 'random'",
    "{{ messages | pprint }}": "No filter named 'pprint'",
    "{{ messages | attr('append') }}": "No filter named 'attr'",
    "{{ lipsum(n=10**6) }}": "only for numbers",
    "{{ lipsum(n=1000000) }}": "'lipsum' is undefined",
    "{{ cycler(1, 2) }}": "'cycler' is undefined",
    "{{ joiner() }}": "'joiner' is undefined",
    "{{ range(1000000000) | list }}": "Range too big",
    "{% for i in range(10000000) %}x{% endfor %}": "Range too big",
    "{{ strftime_now(('%Y' | replace('Y', 'YYYYYYYYYY')) ~ '%999999999d') }}": "date format",
    "{{ strftime_now('%9999999999d') }}": "date format",
    "{{ strftime_now(messages | tojson(indent=200) ) }}": "date format",
    "{{ strftime_now(1) }}": "TypeError",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}": "RecursionError",
    "{% macro f() %}{{ caller() }}{% endmacro %}{{ f() }}": "UndefinedError",
    "{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}": "RecursionError",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{{ namespace.__init__.__globals__ }}": "SecurityError",
    "{{ dict.__subclasses__() }}": "SecurityError",
    "{{ messages.append(1) }}": "SecurityError",
    "{{ messages[0].update({'role': 'x'}) }}": "SecurityError",
    "{{ messages[0].clear() }}": "SecurityError",
    "{% include 'a' %}": "TypeError",
    "{% import 'a' as b %}": "TypeError",
    "{% extends 'a' %}": "TypeError",
    "{% do messages %}": "unknown tag",
    "{% trans %}a{% endtrans %}": "unknown tag",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ messages[5].content.x }}": "UndefinedError",
    "{% for m in messages %}": "TemplateSyntaxError",
    "{{ " + "(" * 3000 + ")" * 3000 + " }}": "Error",
    "{{ " + "-" * 5000 + "1 }}": "Error",
    "{% generation %}": "TemplateSyntaxError",
    "{% macro f() %}c{% generation %}a{% endgeneration %}{% endmacro %}b{{ f() }}": "in a macro",
    "{% set x %}{% generation %}a{% endgeneration %}{% endset %}b{{ x }}": "in a macro",
}

# What a template cannot reach: it is undefined, so it is no text
UNREACHABLE = [
    "{{ ''.__class__ }}",
    "{{ range.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__code__ }}",
    "{{ note_block.__closure__ }}",
    "{{ self.__init__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ namespace.__init__ }}",
    "{{ messages.__class__ }}",
    "{{ messages[0]['__class__'] }}",
    "{{ ''['__class__'] }}",
    "{{ messages | map(attribute='__class__') | join }}",
]

# What only the limits stop
ENDLESS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "seconds",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(40) }}": "seconds",
    "{% for i in range(99999) %}{{ 'a' }}{% for j in range(999) %}bbbbbbbbb{% endfor %}"
    "{% endfor %}": "characters",
    doubling("'ab'", "{% set ns.x = ns.x ~ ns.x %}"): "bytes",
    doubling("'ab'", "{% set ns.x = ns.x + ns.x %}"): "bytes",
    doubling("'ab'", "{% set ns.x = [ns.x, ns.x] | join %}"): "bytes",
    doubling("'ab'", "{% set ns.x = ns.x | replace('b', 'bb') | replace('', 'b') %}"): "",
    doubling("[1]", "{% set ns.x = ns.x + ns.x %}"): "bytes",
    doubling("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x }}": "",
    doubling("[1]", "{% set ns.x = [ns.x, ns.x] %}") + "{{ ns.x | tojson }}": "",
    doubling("[1], y=[1]", "{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}")
    + "{{ ns.x == ns.y }}": "",
    "{{ messages | tojson(indent=9999999999) }}": "bytes",
}


def fails(template):
    """Return the one line with which a template fails."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the callers look at the message)
        render_chat(template, MESSAGES, {})
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def check_alive():
    assert render_chat("{{ messages[0].content }}", MESSAGES, {}).text == "Hello"


@pytest.mark.parametrize("template", REFUSED)
def test_what_no_real_template_does_is_refused_at_once(template):
    assert REFUSED[template] in fails(template)
    check_alive()


@pytest.mark.parametrize("template", UNREACHABLE)
def test_the_interpreter_is_out_of_reach(template):
    assert render_chat(template, MESSAGES, {}).text == ""


@pytest.fixture
def start_limited(tmp_path, monkeypatch):
    """A function that starts a worker which may take so many seconds, and 200 MB."""
    workers = []

    def start(seconds):
        text = Path(template_worker.__file__).read_text(encoding="utf-8")
        for part in ("MAX_SECONDS = 10.0", "MAX_BYTES = 1 << 30", "    limit_memory()\n"):
            assert part in text
        text = text.replace("MAX_SECONDS = 10.0", f"MAX_SECONDS = {seconds}")
        text = text.replace("MAX_BYTES = 1 << 30", "MAX_BYTES = 200 << 20")
        # Importing jinja2 takes long beside these limits, so it is over before the first request.
        text = text.replace("    limit_memory()\n", "    limit_memory()\n    make_environment()\n")
        (tmp_path / "worker.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(template_worker, "__file__", str(tmp_path / "worker.py"))
        worker = chat.Worker()
        workers.append(worker)
        monkeypatch.setattr(chat, "worker", lambda process_id: worker)
        check_alive()
        return worker

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture
def hurried(start_limited):
    return start_limited(seconds=1.0)


@pytest.mark.slow
@pytest.mark.parametrize("template", ENDLESS)
def test_time_memory_and_text_have_limits(template, start_limited):
    # On a slow machine, a second would be over before the memory is full.
    is_about_size = ENDLESS[template] in ("bytes", "characters")
    start_limited(seconds=10.0 if is_about_size else 1.0)
    begin = time.perf_counter()
    message = fails(template)
    assert ENDLESS[template] in message
    assert any(word in message for word in ("seconds", "bytes", "characters", "Error"))
    assert time.perf_counter() - begin < 20
    check_alive()


@pytest.mark.slow
@pytest.mark.parametrize("most", [None, 1 << 40, 1 << 29])
def test_a_lower_limit_of_the_system_stays_because_only_root_may_raise_it(monkeypatch, most):
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    calls = []
    found = resource.RLIM_INFINITY if most is None else most
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (found, found))
    monkeypatch.setattr(resource, "setrlimit", lambda *limit: calls.append(limit))
    template_worker.limit_memory()
    expected = (resource.RLIMIT_AS, (template_worker.MAX_BYTES, template_worker.MAX_BYTES))
    assert calls == ([] if most == 1 << 29 else [expected])


def test_a_system_that_refuses_the_limit_has_none(monkeypatch):
    """macOS does, because a process has taken more addresses than that before it begins."""
    resource = pytest.importorskip("resource", reason="Windows has no such limits")
    asked = []

    def refuse(*limit):
        asked.append(limit)
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    monkeypatch.setattr(resource, "setrlimit", refuse)
    template_worker.limit_memory()
    assert len(asked) == 1


def test_a_single_operation_that_never_comes_back_is_ended(hurried):
    """Squaring a huge number holds the interpreter's lock, so no Python thread could stop it."""
    template = doubling("7", "{% set ns.x = ns.x * ns.x %}")
    assert "seconds" in fails(template)
    check_alive()


@pytest.mark.slow
def test_the_process_does_not_outlive_the_one_that_asks():
    code = (
        "import os; from minia3.checkpoints import chat\n"
        "print(chat.render_chat('{{ 1 }}', [], {}).text)\n"
        "print(chat.worker(os.getpid()).process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    import subprocess

    root = Path(chat.__file__).parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    out = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    text, pid = out.stdout.split()
    assert text == "1"
    for _ in range(100):
        if not is_running(int(pid)):
            return
        time.sleep(0.05)
    pytest.fail("the process still runs")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or " Z " not in status.read_text()


def test_the_template_sees_no_file_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    worker = chat.Worker()
    reply = worker.ask({"template": "{{ 1 }}", "variables": {}})
    worker.close()
    assert reply == {"text": "1", "spans": []}


def test_threads_get_their_own_texts():
    found = {}

    def render(name):
        messages = [{"role": "user", "content": name}]
        found[name] = {render_chat("{{ messages[0].content }}", messages, {}).text}
        for _ in range(20):
            found[name].add(render_chat("{{ messages[0].content }}", messages, {}).text)

    threads = [threading.Thread(target=render, args=(f"thread {i}",)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {f"thread {i}": {f"thread {i}"} for i in range(6)}


def test_after_an_interrupt_the_next_text_is_not_that_of_the_last_request(monkeypatch):
    worker = chat.Worker()
    request = {"template": "{{ messages }}", "variables": {"messages": "first"}}
    assert worker.ask(request)["text"] == "first"
    exchange = worker.exchange

    def interrupted(line):
        worker.process.stdin.write(line)
        worker.process.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "exchange", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.ask(request)
    monkeypatch.setattr(worker, "exchange", exchange)
    request["variables"]["messages"] = "second"
    assert worker.ask(request)["text"] == "second"
    worker.close()


def test_a_template_that_ends_a_process_which_has_just_started_is_blamed(hurried):
    hurried.close()
    template = doubling("7", "{% set ns.x = ns.x * ns.x %}")
    assert "the template takes more than" in fails(template)


def test_a_process_that_does_not_start_is_not_blamed_on_the_template(tmp_path, monkeypatch):
    """sys.executable need not be Python, for example under uWSGI or in a frozen program."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho usage\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    worker = chat.Worker()
    with pytest.raises(ValueError, match="did not start \\(exit code 3\\)") as caught:
        worker.ask({"template": "{{ 1 }}", "variables": {}})
    assert f"sys.executable is {program}, expected Python" in str(caught.value)


def test_what_is_no_text_in_the_import_path_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [tmp_path, *sys.path])  # a Path, which Python ignores, too
    worker = chat.Worker()
    assert worker.ask({"template": "{{ 1 }}", "variables": {}})["text"] == "1"
    worker.close()


def test_a_process_that_was_killed_in_between_starts_again():
    worker = chat.Worker()
    request = {"template": "{{ 1 }}", "variables": {}}
    assert worker.ask(request)["text"] == "1"
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert worker.ask(request)["text"] == "1"
    worker.close()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_renders_with_a_process_of_its_own():
    check_alive()
    child = os.fork()
    if child == 0:
        try:
            check_alive()
            chat.worker(os.getpid()).close()
            chat.worker(os.getppid()).close()  # that of the parent: it must stay
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    check_alive()


def test_without_jinja2_the_error_is_an_import_error(monkeypatch):
    import jinja2

    package = str(Path(jinja2.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != package])
    worker = chat.Worker()
    monkeypatch.setattr(chat, "worker", lambda process_id: worker)
    with pytest.raises(ImportError, match="jinja2"):
        render_chat("{{ 1 }}", MESSAGES, {})
    worker.close()
