"""A machine with a real systemd: systemd-nspawn on an overlay of the host's root, gone when it is left.

The same Python, packages and repository as the host's, at places that a service may see (/opt): the unit hides /root
and /home. Only `sysinit.target` is booted, so none of the host's own services starts. Devices and memory are not
limited in it, and its kernel is the host's.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
NEEDED = ("systemd-nspawn", "nsenter", "mount")
MEMORY = Path("/dev/shm")
PATIENCE_S = 60.0
LOWER = os.environ.get("LAB_ROOT", "/")
"""Another system's root, such as of `mmdebstrap trixie /tmp/trixie`, to try another systemd."""
PYTHON, VENV, CHECKOUT = Path("/opt/python"), Path("/opt/imagend"), Path("/opt/checkout")
PROGRAM = VENV / "bin" / "imagend"
ENVIRONMENT = {"PYTHONPATH": f"{CHECKOUT}:{CHECKOUT}/tests", "LD_LIBRARY_PATH": f"{PYTHON}/lib", "OMP_NUM_THREADS": "1"}
"""What takes the place of an installed imagend, and of a Python that knows where its library is."""


def missing() -> str | None:
    """Why there can be no machines here, or None."""
    if os.geteuid() != 0:
        return "needs root: mounts and namespaces"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    return f"{', '.join(absent)} not installed: tests/lab/packages" if absent else None


class Machine:
    def __init__(self) -> None:
        self._workshop = Path(tempfile.mkdtemp(prefix="imagend-machine-", dir=MEMORY))
        self.root = self._workshop / "root"
        self._console = self._workshop / "console"
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0

    def __enter__(self) -> Machine:
        try:
            self._mount()
            self._furnish()
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._nspawn is not None:
            self._nspawn.send_signal(signal.SIGTERM)
            try:
                self._nspawn.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        if os.path.ismount(self.root):
            subprocess.run(["umount", "--lazy", str(self.root)], check=True)
        shutil.rmtree(self._workshop)

    def _mount(self) -> None:
        upper, work = self._workshop / "upper", self._workshop / "work"
        for folder in (upper, work, self.root):
            folder.mkdir()
        self._workshop.chmod(0o755)
        options = f"lowerdir={LOWER},upperdir={upper},workdir={work}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(self.root)], check=True)

    def _furnish(self) -> None:
        """Python, imagend and its libraries under /opt, as `make install` would have them."""
        for path in ("etc/imagend", "srv/imagend", "etc/systemd/system/imagend.service.d"):
            shutil.rmtree(self.root / path, ignore_errors=True)  # the host's own
        (self.root / "etc/machine-id").write_text("")
        for place in (PYTHON, CHECKOUT, VENV / "bin", self._libraries()):
            (self.root / place.relative_to("/")).mkdir(parents=True, exist_ok=True)
        venv = self.root / VENV.relative_to("/")
        python = Path(sys.base_prefix, "bin", f"python{sys.version_info.major}.{sys.version_info.minor}")
        (venv / "bin" / "python3").unlink(missing_ok=True)
        (venv / "bin" / "python3").symlink_to(PYTHON / "bin" / python.name)
        (venv / "pyvenv.cfg").write_text(f"home = {PYTHON}/bin\ninclude-system-site-packages = false\n")
        program = self.root / PROGRAM.relative_to("/")
        start = f"runpy.run_path('{CHECKOUT}/tests/lab/kinds_daemon.py', run_name='__main__')"
        program.write_text(f"#!{VENV}/bin/python3\nimport runpy\n{start}\n")
        program.chmod(0o755)

    def _libraries(self) -> Path:
        return VENV / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    def _boot(self) -> None:
        binds = {
            Path(sys.base_prefix): PYTHON,
            REPOSITORY: CHECKOUT,
            Path(sysconfig.get_path("purelib")): self._libraries(),
        }
        command = [
            *("systemd-nspawn", f"--directory={self.root}", f"--machine=imagend-{os.getpid()}", "--boot"),
            "--setenv=SYSTEMD_PROC_CMDLINE=systemd.unified_cgroup_hierarchy=0 SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1",
            *("--register=no", "--keep-unit", "--private-network", "--console=pipe", "--quiet"),
            *(f"--bind-ro={ours}:{theirs}" for ours, theirs in binds.items()),
            *("--", "--unit=sysinit.target"),
        ]
        with self._console.open("wb") as console:
            self._nspawn = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True
            )
        self.wait_for(self._find_leader, "its first process")
        self.wait_for(
            lambda: self.run("systemctl", "is-system-running", check=False).stdout.strip() == "running", "boot"
        )

    def _find_leader(self) -> bool:
        assert self._nspawn is not None
        assert self._nspawn.poll() is None, self._console.read_text()
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        self._leader = int(children[0]) if children else 0
        return bool(children) and Path(f"/proc/{self._leader}/root/run/systemd/private").exists()

    def _is_running(self) -> bool:
        return self.run("systemctl", "is-system-running", check=False).stdout.strip() == "running"

    def run(self, *command: object, check: bool = True, user: str | None = None) -> subprocess.CompletedProcess[str]:
        """A command in the machine, as root or as another user."""
        inside = ["nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        as_user = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups", "--"] if user else []
        environment = ENVIRONMENT | {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        done = subprocess.run(
            [*inside, *as_user, *map(str, command)], capture_output=True, text=True, env=environment, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def show(self, *names: str, unit: str = "imagend") -> dict[str, str]:
        """Properties of a unit."""
        told = self.run("systemctl", "show", unit, f"--property={','.join(names)}").stdout
        return dict(line.split("=", 1) for line in told.splitlines())

    def journal(self, *arguments: str) -> str:
        return (
            self.run("journalctl", "--no-pager", "--sync", check=False).stdout
            + self.run("journalctl", "--no-pager", "--quiet", *arguments, check=False).stdout
        )

    def path(self, inside: str | Path) -> Path:
        """A file of the machine's, as the host sees it."""
        return self.root / str(inside).lstrip("/")

    def wait_for(self, condition: Callable[[], Any], what: str) -> Any:
        """Look again and again."""
        end = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            if time.monotonic() > end:
                raise AssertionError(f"waited in vain for {what}\n{self._last_words()}")
            time.sleep(0.05)
        return found

    def _last_words(self) -> str:
        if not self._leader:
            return self._console.read_text()
        shown = self.run("systemctl", "status", "imagend", "--no-pager", "--lines=60", "--full", check=False)
        return shown.stdout
