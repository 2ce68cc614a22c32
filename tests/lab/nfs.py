"""A farm: an NFS server, two hosts that submit, and imagend's daemon on the server or on a third host.

Each is a guest with a kernel of its own. The export and the daemon's home lie on ext4 images, so they outlive a power
cut. Leases and the grace after a restart of the server are shorter here than the usual 90 s.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from lab.uml import Done, Guest, Network, make_disk
from nullworker.generate import picture

from imagend.job import Ref
from imagend.signers import NAMESPACE
from imagend.signing import Key, job_id, seal

LAB = Path(__file__).parent
REPOSITORY = LAB.parents[1]
PATIENCE_S = 120.0
GRACE_S = 10
PYTHON = f"env PYTHONPATH={REPOSITORY} {sys.executable}"
SENDERS = ("alice", "bob")
MOUNT_DISK = "mkdir -p /mnt/disk && mount /dev/ubda /mnt/disk"
EXPORT = """
set -e
modprobe -d /run/kernel -a nfsd sch_netem
mkdir -p /mnt/disk/.nfs-state /mnt/disk/drop/inbox
mount --bind /mnt/disk/.nfs-state /var/lib/nfs/v4recovery
touch /var/lib/nfs/etab /var/lib/nfs/rmtab
mount -t nfsd nfsd /proc/fs/nfsd
echo {lease_s} > /proc/fs/nfsd/nfsv4leasetime; echo {grace_s} > /proc/fs/nfsd/nfsv4gracetime
echo '/mnt/disk/drop *(rw,sync,no_root_squash,no_subtree_check,fsid=0)' > /run/exports
mount --bind /run/exports /etc/exports
rpcbind; rpc.mountd; exportfs -ra; rpc.nfsd -N 3 4
"""
NO_GRACE = "echo Y > /proc/fs/nfsd/v4_end_grace"
LOSE_REPLIES = "tc qdisc add dev eth0 root netem loss 100%"
MOUNT = "modprobe -d /run/kernel nfsv4 && mkdir -p /mnt/drop && mount -t nfs4 -o {} {}:/ /mnt/drop"
SHARED = "/mnt/drop/inbox"  # as NFS clients see it
HOME = "/mnt/disk/imagend"
LOCAL = f"{HOME}/local/inbox"  # the daemon's second inbox, on its own disk


class Farm:
    """`with Farm(…) as farm`: all hosts are up and have mounted; serve() starts the daemon. Seeds tell jobs apart."""

    def __init__(
        self, root: Path, third_host: bool, options: str = "vers=4.2", lease_s: int = 10, **settings: object
    ) -> None:
        self.root, self.third_host, self.options = root, third_host, options
        self.expected: dict[Ref, int] = {}  # the seed of each job whose sender was told that it is in the inbox
        self.uncertain: set[int] = set()  # seeds of jobs whose senders were told nothing, or of an error
        self.dropped_at: dict[Ref, float] = {}
        self._export = EXPORT.format(lease_s=lease_s, grace_s=GRACE_S)
        self.network = Network()
        self.server = Guest("server", 1, self.network, [make_disk(root / "server.img")])
        self.host = Guest("third", 2, self.network, [make_disk(root / "third.img")]) if third_host else self.server
        self.senders = {name: Guest(f"{name}s", 11 + index, self.network) for index, name in enumerate(SENDERS)}
        self.guests = {self.server, self.host, *self.senders.values()}
        self.inbox = SHARED if third_host else "/mnt/disk/drop/inbox"
        self.keys = {name: Key.generate() for name in SENDERS}
        self._write_settings(settings)

    def _write_settings(self, settings: dict[str, object]) -> None:
        home, signers = self.root / "home", ""
        for name, key in self.keys.items():
            own = self.root / name
            own.mkdir()
            (own / "key").write_bytes(key.private_bytes(name))
            (own / "key").chmod(0o600)
            signers += f'{name} namespaces="{NAMESPACE}" {key.public_line(name)}\n'
            (own / "config.yaml").write_text(f"inboxes: [{SHARED}]\nclient: {{name: {name}, key: key}}\n")
        (home / "keys").mkdir(parents=True)
        (home / "keys" / "allowed_signers").write_text(signers)
        config = {
            "models": str(REPOSITORY / "models"),
            "inboxes": [self.inbox, LOCAL],
            "heartbeat_s": 1,
            "reserve_mb": 1,
        }
        (home / "config.yaml").write_text(json.dumps(config | settings))

    def __enter__(self) -> Self:
        try:
            with ThreadPoolExecutor() as pool:
                list(pool.map(Guest.boot, self.guests))
            for guest in {self.server, self.host}:
                guest.run(MOUNT_DISK)
            self.export()
            self.server.run(NO_GRACE)
            for guest in self.guests - {self.server}:
                self.mount(guest)
            self.host.run(f"mkdir -p {LOCAL} && cp -r {self.root}/home/. {HOME} && sync")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for guest in self.guests:
            guest.powercut()
        self.network.close()

    def mount(self, guest: Guest) -> None:
        guest.run(MOUNT.format(self.options, self.server.address))

    def remount(self, options: str) -> None:
        """Mount everywhere with other options; the daemon must be down."""
        self.options = options
        for guest in self.guests - {self.server}:
            guest.run("umount /mnt/drop")
            self.mount(guest)

    def server_returns(self) -> None:
        """After a power cut of the server; a daemon that ran on it is not started."""
        self.server.boot()
        self.server.run(MOUNT_DISK)
        self.export()

    def export(self) -> None:
        self.server.run(self._export)

    # The daemon

    def serve(self) -> None:
        """Start the daemon; returns at once."""
        serve = f"{PYTHON} {LAB / 'null_daemon.py'} serve --config {HOME}/config.yaml"
        inner = f"echo $$ >/run/pid; exec {serve}"
        self.host.run(
            f"rm -f /run/ended; (cd /; setsid sh -c '{inner}'; echo $? >/run/ended) </dev/null >>{HOME}/log 2>&1 &"
        )

    def stop(self) -> int:
        """SIGTERM; the daemon's exit status."""
        self.host.run("kill -TERM $(cat /run/pid)")
        return int(self.wait_for(lambda: self.host.start("cat /run/ended").result(60).out, "the daemon's end"))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.host.run(f"cat {HOME}/spool/status.json 2>/dev/null || echo {{}}"))
        return found

    def ready(self) -> None:
        self.wait_for(lambda: self.status().get("state") in ("ready", "busy"), "a daemon that is ready")

    def ended(self) -> int:
        """How many lines results.jsonl has. Looks at the daemon's own disk only."""
        return int(self.host.run(f"cat {HOME}/outputs/results.jsonl 2>/dev/null | wc -l"))

    # Senders

    def drop(self, name: str, first: int, last: int) -> Future[Done]:
        """Begin to drop a job for each seed, with shell and ssh-keygen; note() the end."""
        self.uncertain |= set(range(first, last + 1))
        return self.senders[name].start(self.dropping(name, first, last))

    def dropping(self, name: str, first: int, last: int, inbox: str = SHARED) -> str:
        return f"{LAB / 'drop.sh'} {self.root / name / 'key'} {inbox} {first} {last}"

    def note(self, name: str, out: str) -> list[Ref]:
        """Expect the jobs that drop.sh says are in the inbox."""
        refs = []
        for line in out.splitlines():
            seed, at, body = line.split(" ", 2)
            refs.append(self.expect(name, body.encode(), int(seed)))
            self.dropped_at[refs[-1]] = float(at)
        return refs

    def expect(self, name: str, body: bytes, seed: int) -> Ref:
        self.uncertain.discard(seed)
        ref = Ref(name, job_id(name, body))
        self.expected[ref] = seed
        return ref

    def sealed(self, name: str, seed: int, at: datetime) -> tuple[bytes, bytes]:
        """The bytes that are signed, and the whole job file."""
        fields = {
            "schema": "imagend.job/v1",
            "kind": "generate",
            "issued_at": at.isoformat(),
            "prompt": "x",
            "seed": seed,
        }
        body = json.dumps(fields).encode()
        return body, seal(body, self.keys[name].sign(body))

    def submit(self, name: str, *arguments: object, seed: int, prefix: str = "") -> Done:
        """`imagend submit`, to its end; what it says it has dropped is expected."""
        self.uncertain.add(seed)
        words = " ".join(map(str, arguments)) or f"generate --prompt x --seed {seed}"
        config = self.root / name / "config.yaml"
        done = (
            self.senders[name]
            .start(f"{prefix} {PYTHON} -m imagend submit --config {config} {words} --json")
            .result(PATIENCE_S)
        )
        if done.status == 0:
            told = json.loads(done.out)
            self.expected[Ref(told["client"], told["id"])] = seed
            self.uncertain.discard(seed)
        return done

    # What came of it

    def audit(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.host.run(f"{PYTHON} {LAB / 'audit.py'} {HOME}/config.yaml"))
        return found

    def check(self, rejected: Iterable[str] = ()) -> dict[str, Any]:
        """Wait until all is taken in and painted; each expected job was painted once, and nothing else was.

        A job that is uncertain was painted at most once. `rejected`: names of files that belong there. Returns the
        manifests, by job.
        """
        self.wait_for(lambda: self.ended() >= len(self.expected), "an end of every job")
        found: dict[str, Any] = self.wait_for(self._settled, "an empty queue")
        published = {Ref(*name.split("/")): manifest for name, manifest in found["published"].items()}
        assert self.expected.keys() <= published.keys(), "lost"
        for ref, seed in self.expected.items():
            assert published[ref]["outcome"] == "succeeded"
            assert published[ref]["pictures"] == {str(seed): hashlib.sha256(picture(seed)).hexdigest()}
        others = [int(seed) for ref in published.keys() - self.expected.keys() for seed in published[ref]["pictures"]]
        assert len(others) == len(set(others)), "twice"
        assert set(others) <= self.uncertain, "never submitted"
        assert found["feed"] == sorted(found["published"]), "not one line in results.jsonl for each"
        names = [name for name in found["rejected"] if not name.endswith(".reason.json")]
        assert names == sorted(rejected)
        assert found["rejected"] == sorted([*names, *(f"{name}.reason.json" for name in names)])
        return published

    def _settled(self) -> dict[str, Any]:
        found = self.audit()
        return {} if found["inbox"] or found["queue"] else found

    def delays(self, published: dict[str, Any], refs: Iterable[Ref]) -> list[float]:
        """Seconds from mv's return on the sender to acceptance, in order; all guests share one clock."""
        return sorted(
            datetime.fromisoformat(published[ref]["accepted_at"]).timestamp() - self.dropped_at[ref] for ref in refs
        )

    def wait_for(self, condition: Callable[[], Any], what: str, limit_s: float = PATIENCE_S) -> Any:
        end = time.monotonic() + limit_s
        while not (found := condition()):
            assert time.monotonic() < end, f"{what}: not after {limit_s} s\n{self.host.run(f'tail -n 30 {HOME}/log')}"
            time.sleep(0.2)
        return found
