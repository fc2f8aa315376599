"""Work spread over processes, in bounded memory, by workers that end with their parent."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from concurrent.futures import ProcessPoolExecutor

# libraries in use here that take long to import
SLOW_IMPORTS = ("torch", "h5py", "nibabel", "scipy.ndimage", "scipy.sparse", "matplotlib.figure")


@contextlib.contextmanager
def worker_pool(workers, jobs):
    """Yield `run(function, argument_tuples)`, a generator of the results in order, from several processes.

    workers: 0 for one per core. No more processes than jobs; with one, the work is done here. A worker ends
    when its parent is killed, and at most two jobs per worker wait: memory does not grow with the cases.
    `function` must not be of the main module, which workers do not run.
    """
    count = min(workers or len(os.sched_getaffinity(0)), jobs)  # cores that this process may use
    if count <= 1:
        yield lambda function, arguments: (function(*each) for each in arguments)
        return
    # forked from a server, since a fork of a process that holds CUDA or threads may hang
    context = multiprocessing.get_context("forkserver")
    # slow to import: once, not in every worker. Not our own modules, which the server would look for in the
    # working directory first; "__main__" would load nothing (both seen in Python 3.11).
    context.set_forkserver_preload([name for name in SLOW_IMPORTS if name in sys.modules])
    with ProcessPoolExecutor(count, context, _end_with_parent) as pool:

        def run(function, arguments):
            waiting = []
            for each in arguments:
                with _main_hidden():  # starts the workers
                    waiting.append(pool.submit(function, *each))
                if len(waiting) >= 2 * count:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()

        try:
            yield run
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


@contextlib.contextmanager
def _main_hidden():
    """Let workers that are started in the block not run the main module first, as they otherwise would.

    A program that calls a script's `main(argv)` without `if __name__ == "__main__"` would run once more in
    each worker, and wait there forever for the cache that its parent has locked.
    """
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _end_with_parent():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent handles it

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
