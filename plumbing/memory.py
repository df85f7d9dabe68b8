"""How much memory this process may still take: of the machine, and of the groups it is in."""
import os
from contextlib import suppress
from pathlib import Path

# Files of a control group: what its processes may take together, what they take, and the name of
# the part of it that caches files, which the kernel gives back when memory gets short.
LIMITS = {"memory.max": ("memory.current", "inactive_file"),                               # v2
          "memory.high": ("memory.current", "inactive_file"),
          "memory.limit_in_bytes": ("memory.usage_in_bytes", "total_inactive_file")}       # v1


def available(root="/"):
    """-> bytes that may still be taken, bytes of the machine; root: where /proc and /sys are."""
    total = free = 8 * 10**9  # Windows
    if hasattr(os, "sysconf"):
        total = free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    about = table(Path(root, "proc/meminfo"))  # empty on macOS
    total = 1024 * about.get("MemTotal", total / 1024)
    free = 1024 * about.get("MemAvailable", free / 1024)
    groups = [limit for folder in groups_of(Path(root)) for limit in room(folder)]
    return min([free, *groups]), total


def groups_of(root):
    """Folders of this process's control group and of all groups around it."""
    with suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            # "0::/user/mine" or, in version 1, "4:memory:/user/mine". The files may lie higher,
            # because the outermost group that a container sees is often its own.
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                mount = root / "sys/fs/cgroup" / ("memory" if controllers else "")
                folder = mount / path.strip("/")
                yield from [folder, *folder.parents][:len(folder.parts) - len(mount.parts) + 1]


def room(group):
    """[bytes that a limit of this group leaves, for each limit it has]."""
    for name, (usage, cache) in LIMITS.items():
        with suppress(OSError, ValueError):  # no such file, or the limit is "max"
            limit = int((group / name).read_text(encoding="utf-8"))
            used = int((group / usage).read_text(encoding="utf-8"))
            yield max(0, limit - used + table(group / "memory.stat").get(cache, 0))


def table(path):
    """A file of lines such as "MemTotal: 16 kB" or "inactive_file 16" -> {name: number}."""
    with suppress(OSError):
        lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
        return {words[0].rstrip(":"): int(words[1]) for words in lines}
    return {}
