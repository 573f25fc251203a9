"""Makes the servers of this checkout importable in the environment that runs it.

The wheel holds `pdserve/` alone (SDK and CLI), so an editable install of it does not reach `controller`, `worker` and the rest.
"""

import sysconfig
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
Path(sysconfig.get_path("purelib"), "pdserve_servers.pth").write_text(f"{CHECKOUT}\n")
