"""Start the workers of a study with submitit (the extra `cluster`): on SLURM, or here.

submitit writes the batch script. A worker that gets submitit's signal (USR2) saves its run and is
queued again: when its time is up and, on clusters that send it then, when its machine is taken
away. A worker that gets SIGTERM saves its run and ends. The other settings of a cluster are
environment variables of sbatch, which override the script: SBATCH_GRES, SBATCH_ACCOUNT ...
"""

import math
import os
import shlex
import signal
from contextlib import contextmanager

from minia3.cli.main import main
from minia3.cli.terminal import show

GPUS = "CUDA_VISIBLE_DEVICES"


class Worker:
    """What submitit calls: `minia3 study ... --run`. Its runs continue where they were stopped.

    is_local: whether it runs on this machine. submitit hides all GPUs from such a worker, so it
    sees those that this process sees. On a cluster, the scheduler says which it has.
    """

    def __init__(self, words, is_local=False):
        self.words = words
        self.is_local = is_local
        self.gpus = os.environ.get(GPUS)  # as they are when it is submitted

    def __call__(self):
        """Raise RuntimeError if a run has failed, because a job that returns is a success."""
        if self.is_local:
            os.environ.pop(GPUS, None)
            if self.gpus is not None:
                os.environ[GPUS] = self.gpus
        with saving_when_time_is_up():
            code = main(self.words)
            if code != 0:
                raise RuntimeError(f"minia3 {shlex.join(self.words)}: the exit code is {code}")
            return code

    def checkpoint(self):
        """Return the job that takes the place of this one. submitit calls it before the end."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextmanager
def saving_when_time_is_up():
    """Within the block, let a run save its state when submitit says that the time is up.

    submitit says so with a signal. Its handler queues the job again, and raises SystemExit wherever
    this process is, so a run would lose all steps since its last checkpoint. Here the run gets a
    SIGTERM in place of SystemExit, which is raised at the end of the block. So the run gives up the
    step in progress, which may take longer than the time that is left.
    """
    number = getattr(signal, "SIG" + os.environ.get("SUBMITIT_PREEMPT_SIGNAL", "USR2"))
    queue_again = signal.getsignal(number)
    without_run = signal.getsignal(signal.SIGINT)
    endings = []

    def receive(number, frame):
        if endings:  # the run is ending already
            return
        try:
            queue_again(number, frame)
        # Not only SystemExit: its time was up too often, or the cluster queues no job again.
        except (SystemExit, Exception) as ending:
            endings.append(ending)
            if signal.getsignal(signal.SIGINT) == without_run:
                raise
            # A real SIGTERM may end this process without the exit code that submitit waits for.
            stop_run = signal.getsignal(signal.SIGTERM)
            stop_run(signal.SIGTERM, frame)

    if not callable(queue_again):  # submitit has not started this process
        yield
        return
    signal.signal(number, receive)
    try:
        yield
    finally:
        signal.signal(number, queue_again)
        if endings:
            raise endings[0]


def submit(target, words, folder, n_workers, hours):
    """Start `n_workers` workers for `hours` at most, and print their jobs.

    target: CLUSTER or CLUSTER:PARTITION. words: what follows `minia3` in the workers' command line.
    folder: for what the workers print. Raise ValueError if its path has a %, because submitit and
    SLURM take `runs/50%train` for a place with the number of a task in it: the job would be lost.
    """
    path = folder.absolute()
    if "%" in str(path):
        raise ValueError(
            f"{path}: found a %, which submitit replaces with the number of a job: choose another "
            "--out"
        )
    try:
        import submitit
    except ImportError:
        raise ValueError("--submit needs submitit: pip install 'minia3[cluster]'") from None
    cluster, _, partition = target.partition(":")
    executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
    executor.update_parameters(name="minia3", timeout_min=math.ceil(60 * hours))
    if partition:
        executor.update_parameters(slurm_partition=partition)
    with executor.batch():
        worker = Worker(words, is_local=cluster == "local")
        jobs = [executor.submit(worker) for _ in range(n_workers)]
    for job in jobs:
        show(f"job {job.job_id} prints to {job.paths.stdout}")
