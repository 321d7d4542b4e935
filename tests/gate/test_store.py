"""What all workers share, under interleavings and sizes that a running gate meets rarely."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.gate.small_nginx import SmallNginx
from tests.ports import free_port

CONFIG = """
    lua_shared_dict sg_counts 1m;
    lua_shared_dict sg_state 1m;
    lua_shared_dict sg_keys 1m;
    lua_shared_dict sg_rates 1m;
    lua_shared_dict sg_pages 1m;
    init_by_lua_block {{ store = require "gate.store"; store.boot() }}
    init_worker_by_lua_block {{ store.join() }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            client_body_buffer_size 1m;
            content_by_lua_block {{
                ngx.req.read_body()
                ngx.print(tostring(assert(loadstring(ngx.req.get_body_data()))()))
            }}
        }}
    }}
"""
Run = Callable[[str], str]


@pytest.fixture
def run(folder: Path) -> Iterator[Run]:
    """Runs Lua in a worker that has a slot; gives what it returns."""
    port = free_port()
    nginx = SmallNginx(folder, port, CONFIG.format(port=port))

    def ask(lua: str) -> str:
        nginx.connection.request("POST", "/", lua.encode())
        answer = nginx.connection.getresponse()
        text = answer.read().decode()
        assert answer.status == 200, (folder / "error.log").read_text()
        return text

    yield ask
    nginx.stop()


def test_a_slot_that_another_freed_and_a_new_worker_took_is_not_freed_again(run: Run) -> None:
    found = run(
        """
        local state, counts = ngx.shared.sg_state, ngx.shared.sg_counts
        state:set("worker:2", "999999999.1") -- of a worker that died
        state:set("slots", 2)
        -- While we look through the counts another worker has done so, and a new one has come.
        counts.get_keys = function()
            state:set("worker:2", store.tag())
            return {}
        end
        store.reap()
        counts.get_keys = nil
        return state:get("worker:2") == store.tag() and #store.workers()
        """
    )
    assert found == "2"


def test_a_dead_workers_slot_is_freed(run: Run) -> None:
    found = run(
        """
        local state, counts = ngx.shared.sg_state, ngx.shared.sg_counts
        state:set("worker:2", "999999999.1")
        state:set("slots", 2)
        counts:set("999999999.1:r:a", 3)
        store.reap()
        return #store.workers() .. " " .. tostring(counts:get("999999999.1:r:a"))
        """
    )
    assert found == "1 nil"


def test_growth_of_load_does_not_push_the_snapshot_out(run: Run) -> None:
    """Seconds of work of a busy gate fill in a small dict what takes days in a real one."""
    found = run(
        """
        assert(store.put_snapshot(nil, "a:1", ("x"):rep(50000), 1))
        local now = 0
        for _ = 1, 4 do
            for _ = 1, 4000 do
                now = now + 0.005
                store.grow("r1", now, 0.005)
            end
            ngx.sleep(1.1) -- all that was noted has expired
        end
        return store.snapshot("a:1") and "there" or "gone"
        """
    )
    assert found == "there"


def test_a_snapshot_that_was_evicted_comes_back(run: Run) -> None:
    found = run(
        """
        assert(store.put_snapshot(nil, "a:2", "old", 1))
        ngx.shared.sg_state:delete("snap:a:2")
        local told = {}
        -- A new worker has nothing, and is sent all; a late answer is still late.
        for _, version in ipairs { "a:1", "a:2", "a:2" } do
            told[#told + 1] = tostring(store.put_snapshot(nil, version, "new", 2))
        end
        return table.concat(told, " ") .. " " .. tostring(store.snapshot("a:2"))
        """
    )
    assert found == "false true false new"
