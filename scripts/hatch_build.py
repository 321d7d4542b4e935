"""Build hook: puts the gate's Lua code, the nginx template and the schema into the wheel.

A regular wheel carries them under ``slurmgate/share``. An editable install does not: there the
package finds them in the checkout, where a copy would only grow stale.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SHARED = {
    "lua/gate": "slurmgate/share/lua/gate",
    "openresty/nginx.conf.j2": "slurmgate/share/openresty/nginx.conf.j2",
    "config/services.schema.json": "slurmgate/share/config/services.schema.json",
}


class ShareHook(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the shared files to standard wheels."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build; ``version`` is ``standard`` or ``editable``."""
        if version == "standard":
            build_data["force_include"].update(SHARED)
