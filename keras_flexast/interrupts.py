"""Ctrl-C ends the program within seconds, also inside a compiler and where Python drops it."""

import os
import signal
import socket
import sys
import threading
import time

GRACE = 2.0  # seconds that the program may take to end by itself
EXIT_CODE = 130  # what a shell reports for a program that Ctrl-C ended

_leaving = threading.Lock()


def end_on_interrupt(message):
    """From now on Ctrl-C (SIGINT) ends this program within seconds, with one line and EXIT_CODE.

    It raises KeyboardInterrupt in the main thread, as ever. But Python raises nothing before a
    call into TensorFlow or XLA returns, which may compile for minutes, and only prints what is
    raised in a `__del__`. So a thread, woken by the signal itself, ends the program where it is
    still there after GRACE seconds. A program that ignores SIGINT goes on ignoring it.

    Whoever catches KeyboardInterrupt calls what this function returns. It does not wait for
    the threads of TensorFlow or JAX, which finish what they compute before Python ends.

    Args:
        message: function without arguments to the line, asked for when it is printed.

    Returns:
        function without arguments that prints the line and ends the program.
    """
    errors = os.dup(2)  # standard error as it is now

    def leave():
        if _leaving.acquire(blocking=False):  # the first of two threads
            start = "\n" if os.isatty(errors) else ""  # a progress bar may be there
            os.write(errors, f"{start}{message()}\n".encode())
        os._exit(EXIT_CODE)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        ends = socket.socketpair()
        ends[1].setblocking(False)
        signal.set_wakeup_fd(ends[1].fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(ends, leave), daemon=True).start()
        sys.unraisablehook = _without_interrupts(sys.unraisablehook)
    return leave


def _watch(ends, leave):
    """Wait for SIGINT, then for the program to end by itself, then end it."""
    while ends[0].recv(1) != bytes([signal.SIGINT]):
        pass  # another signal that Python handles
    time.sleep(GRACE)
    leave()


def _without_interrupts(hook):
    """The hook for what Python cannot raise, without the KeyboardInterrupt that ends here."""
    return lambda dropped: (
        None if issubclass(dropped.exc_type, KeyboardInterrupt) else hook(dropped)
    )
