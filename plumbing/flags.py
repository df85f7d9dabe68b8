"""What command lines share: errors in one line."""
import errno
import os
import signal
import sys
import time
from contextlib import suppress
from traceback import format_exception

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def speak_once(kind, error, traceback):
    """For scripts: `sys.excepthook = speak_once` prints what the user can mend as one line, and exits.

    That is a ValueError or OSError raised in this repository, an OSError that names a file, a full disk.
    Anything else is a bug and keeps its traceback. Of several ranks rank 0 speaks first: torchrun ends the others
    with it, and what they have to say is the same, or that it is gone.
    """
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    file = os.path.abspath(traceback.tb_frame.f_code.co_filename) if traceback else ""
    ours = file.startswith(ROOT + os.sep) and "site-packages" not in file  # a venv may live in the repository
    about_files = isinstance(error, OSError) and (error.filename is not None or error.errno == errno.ENOSPC)
    mendable = about_files or ours and isinstance(error, (ValueError, OSError))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not (mendable and os.environ["RANK"] == "0"):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(2)
    if isinstance(error, KeyboardInterrupt):
        message, code = "interrupted: start the same command again to continue", 130
    elif mendable:
        message, code = f"{os.path.basename(sys.argv[0])}: {error}", 2
    else:
        message, code = "".join(format_exception(error)).rstrip(), 1
    with suppress(OSError):  # a closed pipe has nobody left to tell
        print(message, file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(code)  # not sys.exit: threads and process groups of a broken run may wait forever
