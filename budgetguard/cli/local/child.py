"""Becomes another program that ends when its parent does: ``python -I -S child.py PARENT SIGNAL UID GID COMMAND...``.

Run as a file, by the standard library alone: it is between the supervisor and every part of the stack. Without it, a
supervisor that is killed would leave servers behind that hold ports and data. UID and GID ``-`` mean: stay who we are.
"""

import ctypes
import os
import signal
import sys

# From linux/prctl.h.
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Drop privileges, tie this process to its parent, and become the command."""
    parent, death_signal, uid, gid, *command = sys.argv[1:]
    if uid != "-":
        os.setgroups([])
        os.setgid(int(gid))
        os.setuid(int(uid))
    # After the change of user, which clears it. Elsewhere than on Linux the next start cleans up by pid instead.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)
    os.execvp(command[0], command)  # noqa: S606 - the supervisor's own command line


if __name__ == "__main__":
    main()
