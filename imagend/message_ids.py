"""What `journalctl MESSAGE_ID=…` finds: an id for each event that an operator may want to look for. They never change.

docs/operations.md shows the same table. A new one: python -c 'import uuid; print(uuid.uuid4().hex)'
"""

from __future__ import annotations

MESSAGE_IDS = {
    "accepted": "580b9b41b8ec405281a51c73286d1c3a",
    "started": "5ffd9f6dd16141a5bd2fe61937b76eba",
    "ended": "73c534f5af70452e82b27af779ef5cd3",
    "rejected": "19ac839c5b3949eb9c98cff5d24d6432",
    "requeued after a crash": "9c5d493a017548048e83d74b019d9df8",
    "a job's file is damaged; it was set aside: submit it again": "f357005dfb3b497ea650ca2eeacb12f8",
    "a file cannot be moved out of the inbox": "d4534703bf24487eb55e7ed38a8debd9",
    "queued again by the operator": "a0abc4f1543f4e66a4a335b04e76fa24",
    "purged by the operator": "4d06c77fd00e471c842a42b6de3f0d82",
    "an order is not carried out": "2dbf36ac31074af489c024fa5dba5a1e",
    "a file met a bug": "2d20f69b0ed94390ad054187b9030dbf",
    "degraded": "9cea786a5d3b4fd3b71c6ae40d457363",
    "configuration read again": "1254d5c676544cba9087c8f983f7ddda",
    "keys read": "de6882033e604212b99c39c3cd9c84c6",
    "worker ready": "9d5e7c915f5b4033b79aa346067c22e1",
    "worker died": "75bb20c971a74ebdbe1ef96ddf53ff23",
    "a worker is replaced": "14bdac3095234230af4a749c42381e3b",
    "a worker met a bug": "2d38cda8454845b7bd608ed01eb7c8ce",
    "out of memory; another way is tried": "fbcfdb25a89d41268b5d82e5733f911d",
    "out of memory; the job is given up": "4c62dd1c7045469488d8dadbd3a49c7c",
    "stopping; ask again to stop at once": "e2065cdcdd8d4c9bbdc695661f548092",
    "stopped": "951e99ce6f93460987461d8018b39e82",
}
