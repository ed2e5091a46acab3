"""Make the keys of a tcp endpoint: one folder for the engine, one for each client.

    python scripts/make_keys.py keys/engine                     # once
    python scripts/make_keys.py keys/engine --client alice      # lists alice, writes keys/alice

Then `engine-launch --frontend-endpoint tcp://0.0.0.0:5757 --auth-keys keys/engine`; copy the folder keys/alice, and
nothing else, to alice's host, for `engine-frontend --connect tcp://HOST:5757 --auth-keys alice`. Removing
keys/engine/clients/alice.key keeps alice from connecting again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ipc.auth import make_client_keys, make_server_keys
from ipc.errors import ConfigError
from ipc.lifetime import fail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="key folder of the engine")
    parser.add_argument("--client", metavar="NAME", help="make the keys of a client that this engine shall accept")
    parser.add_argument("--to", type=Path, metavar="DIR", help="folder of the client (default: NAME beside FOLDER)")
    options = parser.parse_args()
    try:
        if options.client is None:
            make_server_keys(options.folder)
            print(f"{options.folder}: keys of the engine")
        else:
            to = options.to or options.folder.parent / options.client
            make_client_keys(options.folder, options.client, to)
            print(f"{to}: keys of client {options.client}")
    except (ConfigError, OSError) as error:
        return fail("make_keys", error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
