"""Owns the examples that `up` prints: to be pasted as they are."""

from __future__ import annotations

import os

from pdserve.cli.access import Access

_EXPORT = 'export PDSERVE_API_KEY="${PDSERVE_API_KEYS%%,*}"'  # the servers' variable may hold several


def shell_snippet(access: Access, model: str) -> str:
    key = ' -H "Authorization: Bearer $PDSERVE_API_KEY"' if access.api_key else ""
    export = f"{_EXPORT}\n" if access.api_key and not os.environ.get("PDSERVE_API_KEY") else ""
    trusted = f" --cacert {access.trusted_pem}" if access.trusted_pem else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "What does json.loads do?"}}], "max_tokens": 64}}'
    return f"{export}curl{trusted} {access.api_url}/v1/chat/completions{key} \\\n  -H 'Content-Type: application/json' -d '{body}'"


def python_snippet(access: Access, model: str) -> str:
    key = 'api_key=os.environ["PDSERVE_API_KEY"]' if access.api_key else ""
    tls = f'tls=Tls(ca="{access.trusted_pem}")' if access.trusted_pem else ""
    arguments = ", ".join(part for part in (f'"{access.grpc_address}"', key, tls) if part)
    imports = ("import os\n\n" if key else "") + f"from pdserve.client import Client, Sampling{', Tls' if tls else ''}"
    return (
        f"{imports}\n\n"
        f"with Client({arguments}) as client:\n"
        f'    for delta in client.generate("def read_lines(path):", Sampling(max_tokens=64)):\n'
        f'        print(delta.text, end="", flush=True)'
    )
