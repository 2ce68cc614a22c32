"""A disk that fails and is mended while the daemon works: nothing is lost, nothing is claimed, and all drains.

python tests/lab/trouble.py FOLDER SPOIL MEND WORDS: the same in a guest, where it needs the standard library alone.
FOLDER is as for a drill; SPOIL and MEND are shell commands, run there; WORDS is what strerror(3) says.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from lab.drill import Drill, load_plan

STATES = ("pending", "active", "done")


class Endurance(Drill):
    """`in_hand` is the number of the job that is being painted when the disk fails; it may fail, if it says so."""

    in_hand = 2

    def endure(self, spoil: str, mend: str, words: str) -> None:
        """The disk is mended under the daemon, which needs nobody's help."""
        with self.serving() as daemon:
            self.meet(spoil, daemon)
            self.wait(lambda: self.logged(words) and self.told(words), daemon)
            self.nothing_is_lost()
            self.shell(mend)
            self.finish_well(daemon)

    def fall(self, spoil: str, words: str) -> None:
        """The disk is gone for good, and then the daemon."""
        with self.serving() as daemon:
            self.meet(spoil, daemon)
            self.wait(lambda: self.logged(words), daemon)

    def rise(self) -> None:
        """After a fall the disk is there again, and the daemon starts on what it holds."""
        self.nothing_is_lost()
        with self.serving() as daemon:
            self.wait(lambda: self._works(daemon.pid), daemon)
            self.finish_well(daemon)

    def meet(self, spoil: str, daemon: subprocess.Popen[bytes]) -> None:
        """Jobs have ended, one is being painted, more come when the disk has failed."""
        self.wait(lambda: self._works(daemon.pid), daemon)
        self.send(self.in_hand)
        self.wait(self._idle, daemon)
        self.send(1)
        self.wait(lambda: self.status()["queue"]["active"] == 1, daemon)
        self.shell(spoil)
        self.send(len(self.waiting))

    def finish_well(self, daemon: subprocess.Popen[bytes]) -> None:
        self.wait(lambda: not self.waiting and self._idle(), daemon)
        self.wait(lambda: (self.status()["state"], self.status()["reasons"]) == ("ready", []), daemon)
        self.finish(daemon)
        self.nothing_is_lost()
        for number, letter in enumerate(self.plan):
            manifest = self.whole(next((self.root / "disk" / "outputs").glob(f"*/{letter.id}")))
            failed_aloud = number == self.in_hand and manifest["outcome"] == "failed" and manifest["error"]["message"]
            assert manifest["outcome"] in letter.outcomes or failed_aloud, manifest

    def shell(self, command: str) -> None:
        done = subprocess.run(["bash", "-c", command], cwd=self.root, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.root / "disk" / "spool" / "status.json").read_bytes())
        return status

    def told(self, words: str) -> bool:
        """Whether status.json says so; where somebody took the last room for it, the log says that."""
        status = self.status()
        degraded = status["state"] == "degraded" and any(words in reason for reason in status["reasons"])
        return degraded or self.logged(f"status.json cannot be written: {words}")

    def logged(self, words: str) -> bool:
        told = [json.loads(line) for line in (self.root / self.log).read_text().splitlines() if line.startswith("{")]
        return any(line["event"] == "degraded" and words in line["why"] for line in told)

    def nothing_is_lost(self) -> None:
        """Each job is in the inbox or in the queue, and what is published is whole."""
        for letter in self.plan:
            places = [self.inbox / letter.name, *(self.root / "disk" / "spool").glob(f"*/*/{letter.name}")]
            assert any(place.exists() for place in places), f"{letter.id} is lost"
        for folder in (self.root / "disk" / "outputs").glob("[!.]*/*/"):
            self.whole(folder)

    def whole(self, folder: Path) -> dict[str, Any]:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_bytes())
        for artifact in manifest["artifacts"]:
            assert hashlib.sha256((folder / artifact["file"]).read_bytes()).hexdigest() == artifact["sha256"], folder
        return manifest


if __name__ == "__main__":
    folder, *rest = sys.argv[1:]
    Endurance(Path(folder), load_plan(Path(folder))).endure(*rest)
