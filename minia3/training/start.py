"""Begin and end a run: what `python train.py`, `minia3 train` and `minia3.train` do alike.

Each of the three hands over `run_grid` of train.py, because no module imports train.py.
"""

import sys
import traceback
from contextlib import contextmanager

from minia3.files.messages import message_of, shorten
from minia3.files.processes import (
    PeerGone,
    computing_together,
    from_first,
    has_first_word,
    is_first,
    join,
    leave,
)
from minia3.files.read import is_out_of_memory
from minia3.files.streams import lasting_output, only_first_prints, print_last, use_utf8
from minia3.files.write import is_disk_error
from minia3.training.announce import announcing_warnings
from minia3.training.command_line import error_line, read_command_line
from minia3.training.memory_fit import out_of_memory_message
from minia3.training.process_state import unchanged_process
from minia3.training.run import Failed, Run
from minia3.training.signals import Signals, Stopped


def run_command_line(words, run_grid, program, is_program=False):
    """Return the exit code: 0, 2 for a user's mistake, 1 for a failure, 128 + n for signal n.

    is_program: whether this process does nothing else, so that a signal may end it at any time.
    """
    use_utf8()
    with lasting_output():
        code = exit_code_of(words, run_grid, program, is_program)
        return leave(code) if is_program else code


def exit_code_of(words, run_grid, program, is_program):
    """Run what the words say, print what is wrong, and return the exit code."""
    try:
        join()
        config = None
        if is_first():
            config = read_command_line(words, program)
        run = run_config(from_first(config), run_grid, program, is_program)
        if run.failed_message is not None:
            raise Failed(run.failed_message)
        return 0
    except SystemExit:  # --help
        has_first_word(0)
        raise
    except Stopped as stop:
        return 128 + stop.number
    except KeyboardInterrupt:  # before the run takes signals, or while its trackers close
        has_first_word(130)
        return 130
    except (Failed, PeerGone, OSError, ValueError) as error:
        code = 2 if isinstance(error, ValueError) else 1
        if has_first_word(code):
            print_last(error_line(program, error))
        return code


@contextmanager
def freeing_memory():
    """Return a context. If an error ends it, let go of what its functions held, such as the model.

    A notebook keeps its last error, and with the traceback the variables of all functions that the
    error has ended. But the error may say how to continue, and the next model needs the memory.
    """
    handled_before = sys.exc_info()[1]  # by the caller, whose functions keep their variables
    try:
        yield
    except BaseException as error:
        earlier = error  # which led to this one: out of memory, before Failed
        while earlier not in (None, handled_before):
            traceback.clear_frames(earlier.__traceback__)
            earlier = earlier.__context__
        raise


@freeing_memory()
def run_config(config, run_grid, program, is_program=False):
    """Run what the flags say, and return the Run. The process stays as it was.

    The Run of a grid may have results although some of its adapters failed: see `failed_message`.
    Raise ValueError for a user's mistake, Failed if the training failed, memory ran out, the disk
    is full, or torch cannot compile the model, and Stopped after a signal.
    """
    run = None
    ending = "failed"
    try:
        join()
        signals = Signals(is_program)
        with (
            only_first_prints(),
            unchanged_process(),
            announcing_warnings(),
            signals,
            signals.last_words(lambda number: say_stopped(run, number)),
            signals.arriving(),
            computing_together(),
        ):
            run = Run(config, signals, program)
            run_grid(run, config)
            # This waits until the first process has written everything.
            run.failed_message = from_first(run.describe_failures())
        ending = run.ending
        return run
    except Stopped:
        ending = "stopped"
        raise
    except PeerGone as gone:
        if run:
            run.discard_if_new()
            raise Failed(run.with_continuation(str(gone))) from None
        raise
    except (Failed, MemoryError, OSError, RuntimeError, ValueError) as error:
        if run:
            run.discard_if_new()
        message = advice_after(error, run)
        if message is not None:
            raise Failed(message) from None
        raise
    finally:
        if run:
            run.close(ending)


def say_stopped(run, number):
    """Say that a signal has stopped the run, and how to continue it. run: None if there is none."""
    message = run.stop_message if run else "stopped"
    if has_first_word(128 + number):
        print_last(message)


def advice_after(error, run):
    """Return what a run says if its user can do something about an error, or None."""
    if is_out_of_memory(error):
        return out_of_memory_message(error, run)
    if is_compile_error(error):
        return compile_message(error)
    if run and is_disk_error(error):
        return run.with_continuation(message_of(error))
    return None


def is_compile_error(error):
    """Return whether an exception is one of torch's compiler."""
    module = sys.modules.get("torch._dynamo.exc")  # absent unless something was compiled
    return module is not None and isinstance(error, module.TorchDynamoException)


def compile_message(error):
    """Return what a run says if --compile fails: why, and what to do."""
    reason, _, _ = str(error).partition("Set TORCHDYNAMO_VERBOSE")  # for who repairs the compiler
    reason = shorten(" ".join(reason.split()), 200)
    needs = "on a CPU it needs a C++ compiler such as g++, and on a GPU Triton"
    return f"--compile: torch's compiler failed ({needs}): {reason}; or train without --compile"
