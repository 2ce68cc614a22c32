"""python tests/fetching: the real process that fetches, with a server of this machine in place of the internet."""

from __future__ import annotations

import argparse
import socket
import ssl
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from imagend import config as configuration
from imagend.config import Config
from imagend.fetch import download, main, patience, tokens
from imagend.fetch.__main__ import config_of, settle_in
from imagend.fetch.addresses import Address
from imagend.fetch.web import Web

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--pem")
    parser.add_argument("--fd", type=int)
    parser.add_argument("--device")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--settings")
    arguments = parser.parse_args()
    settle_in()
    download.CHUNK_BYTES = 1000  # of some kB
    patience.MAX_TRIES = 1  # waiting between tries is tried elsewhere
    main.PROGRESS_INTERVAL_S = 0.0
    config = config_of(arguments.settings, arguments.models)

    def go_online(config: Config) -> Web:
        spoken = tokens.load(config.fetch.tokens, configuration.credentials())
        addresses = [Address("127.0.0.1", arguments.port)]
        trust = ssl.create_default_context(cafile=arguments.pem)
        return Web(config.fetch, spoken, lambda _: addresses, allow_private=True, trust=trust)

    main.serve(socket.socket(fileno=arguments.fd), config, go_online)
