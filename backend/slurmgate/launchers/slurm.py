"""Runs replicas as Slurm jobs on clusters behind login hosts.

State, under one lock that is held only for looking things up: the sites, where each replica is, the
configured services by route, ports that were found taken, and the last lines of replicas that have
ended. The jobs themselves are the sites', the ways to them are those of ``ways``.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from slurmgate import procfs, upstream_keys
from slurmgate.errors import CannotStart, SlurmgateError, StartRefused
from slurmgate.launchers import avoiding, posts
from slurmgate.launchers.crew import Crew
from slurmgate.launchers.host import Host
from slurmgate.launchers.job import Stage
from slurmgate.launchers.posts import Moment, Post
from slurmgate.launchers.site import UNCONFIRMED_MAX, Site
from slurmgate.launchers.slurm_format import JobName
from slurmgate.launchers.ways import Ways
from slurmgate.model import (
    End,
    Fault,
    LauncherKind,
    ServiceSpec,
    Sighting,
    SshSpec,
    Stranger,
)
from slurmgate.ports import Adoption, Observer
from slurmgate.records import Record, Records
from slurmgate.ssh import Remotes
from slurmgate.state import StateDir

log = logging.getLogger(__name__)

LINES_KEPT = 300.0
PORT_AVOIDED = 600.0
CANCEL_PATIENCE = 20.0
HIGHEST_PORT = 65535

SiteKey = tuple[SshSpec | None, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class _Held:
    """Where a replica is, from before its submission to its end; ``leaving``: it was stopped."""

    site: Site
    service: str
    port: int
    leaving: bool = False


class SlurmLauncher:
    """The launcher ``slurm``; see ``ports.Launcher`` for what its methods promise."""

    def __init__(
        self,
        state: StateDir,
        instance: str,
        remotes: Remotes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.instance = instance
        self.owner = state.owner
        self.records = Records(state.replicas)
        self.closing = threading.Event()
        self._remotes = remotes
        self._clock = clock
        self._boot = procfs.boot_id()
        self._observer: Observer | None = None
        self._lock = threading.Lock()
        self._refusing = False
        self._sites: dict[SiteKey, Site] = {}
        self._held: dict[str, _Held] = {}
        self._routes: dict[str, ServiceSpec] = {}
        self._taken: dict[tuple[Site, int], float] = {}
        self._lines: dict[str, tuple[float, tuple[str, ...]]] = {}
        self.ways = Ways(self.owner, state.tunnel_sockets, state.node_keys, remotes, self)

    # -- ports.Launcher ----------------------------------------------------------------------

    def adopt(self, specs: Sequence[ServiceSpec], observer: Observer) -> Adoption:
        """Know every recorded replica and begin to look after all of them."""
        self._observer = observer
        configured = {spec.name: spec for spec in specs}
        self._routes = {spec.route_name: spec for spec in specs}
        names: dict[Site, set[str]] = {}
        for spec in specs:
            names.setdefault(self._site(spec.ssh, spec.remote_setup)[0], set()).add(spec.name)
        found = []
        for record in self.records.read_all():
            if record.launcher is LauncherKind.SLURM:
                post = self._recorded(record, configured.get(record.service))
                if post is not None:
                    found.append((post, self._held[post.replica].site))
        self.ways.sweep({f"{post.replica}.{post.job.gen}" for post, _ in found if post.told})
        sightings = []
        for post, site in found:
            names.setdefault(site, set()).add(post.record.service)
            self._reopen(post, site)
            job = site.crew.job(post.replica)
            if post.told and job is not None:
                sightings.append(posts.sighting(post, job))
        for site, services in names.items():
            site.start(frozenset(services))
        return Adoption(tuple(sightings), frozenset().union(*names.values()))

    def launch(self, spec: ServiceSpec, replica: str, avoid: Sequence[str] = ()) -> Sighting:
        """Submit the job of a replica; its record is on the disk before that.

        Nodes to avoid that are not named as nodes are, or that the service insists on, are not.
        """
        site, fresh = self._site(spec.ssh, spec.remote_setup)
        if fresh:
            site.start()
        post = self._reserve(spec, replica, site, avoiding.nameable(avoid))
        try:
            return site.launch(post)
        except SlurmgateError:
            with self._lock:
                self._held.pop(replica, None)
            raise

    def stop(self, replica: str) -> None:
        """Cancel the replica's job, as soon as it is known which one that is."""
        with self._lock:
            held = self._held.get(replica)
            if held is not None:
                self._held[replica] = replace(held, leaving=True)
        if held is not None:
            held.site.crew.stop(replica)

    def reconnect(self, replica: str) -> None:
        """Open the tunnel to a replica anew."""
        self.ways.reopen(replica)

    def log_tail(self, replica: str, lines: int) -> list[str]:
        """Give the last lines of a job's output, for some minutes after its end too."""
        kept = self._lines.get(replica)
        if kept is not None:
            return list(kept[1][-lines:]) if lines > 0 else []
        held = self._held.get(replica)
        return [] if held is None or lines <= 0 else held.site.crew.tail(replica, lines)

    def explain(self, replica: str) -> str | None:
        """Say why the replica was not reached, as far as SSH said."""
        said = self.ways.explain(replica)
        held = self._held.get(replica)
        if said is not None or held is None:
            return said
        job = held.site.crew.job(replica)
        return None if job is None or job.endpoint is not None else job.reason

    def take_over(self, owner: str) -> int:
        """Give the jobs of another owner names of ours; listings then find and adopt them."""
        taken, problem = 0, None
        sites = self._all_sites()
        for site in sites:
            try:
                taken += site.take_over(owner)
            except SlurmgateError as error:
                log.warning("%s: nothing taken over: %s", site.name, error)
                problem = error
        for site in sites if taken else ():  # several may see one cluster, in different ways
            site.look()
        if problem is not None and not taken:
            raise problem
        return taken

    def strangers(self) -> tuple[Stranger, ...]:
        """Jobs of our instance that another owner submitted, as last listed."""
        found = {
            (one.name.owner, one.row.job_id): Stranger(
                one.name.owner, one.row.job_id, one.name.route, one.state, site.name
            )
            for site in self._all_sites()
            for one in site.strangers()
        }
        return tuple(found.values())

    def close(self, *, stop_replicas: bool, keep_ways: bool = True) -> None:
        """Look after nothing any more; with ``stop_replicas`` every job is cancelled first."""
        self._refusing = True
        sites = self._all_sites()
        if stop_replicas:
            self._cancel_all(sites)
        self.closing.set()
        for site in sites:
            site.wake()
        if not keep_ways:
            self.ways.close_all()
        self.ways.shutdown()

    # -- for the sites -----------------------------------------------------------------------

    @property
    def observer(self) -> Observer:
        """See ``Desk``."""
        assert self._observer is not None, "adopt comes first"
        return self._observer

    def is_elsewhere(self, name: JobName, crew: Crew) -> bool:
        """See ``Desk``."""
        with self._lock:
            held = self._held.get(name.replica)
            if held is not None:
                return held.site.crew is not crew
            spec = self._routes.get(name.route)
            site = None if spec is None else self._sites.get(_key(spec))
            return spec is not None and (site is None or site.crew is not crew)

    def claim(self, name: JobName, crew: Crew) -> Post | None:
        """See ``Desk``."""
        with self._lock:
            spec = self._routes.get(name.route)
            site = None if spec is None else self._sites.get(_key(spec))
            if spec is None or site is None or site.crew is not crew:
                return None
            if spec.upstream_key and name.start_hash == spec.start_hash():
                log.info("replica %s: its key is in no record here", name.replica)
                return None
            known = sum(held.service == spec.name for held in self._held.values())
            if known > spec.replicas.max:  # one more than that may be there while it replaces one
                return None
            self._held[name.replica] = _Held(site, spec.name, name.port)
        return posts.new(spec, name, self._boot, self._moment())

    def ended(self, post: Post, end: End, lines: Sequence[str]) -> None:
        """See ``Desk``."""
        now = self._clock()
        with self._lock:
            held = self._held.pop(post.replica, None)
            if held is not None and end.fault is Fault.PORT:
                self._taken[held.site, held.port] = now
            self._lines[post.replica] = (now, tuple(lines))
            for old in [r for r, (at, _) in self._lines.items() if now - at > LINES_KEPT]:
                del self._lines[old]

    # -- for the ways ------------------------------------------------------------------------

    def connected(self, replica: str, gen: int, endpoint: str) -> None:
        """See ``WayObserver``."""
        held = self._held.get(replica)
        if held is not None:
            held.site.crew.connected(replica, gen, endpoint)

    def troubled(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        held = self._held.get(replica)
        if held is not None:
            held.site.crew.troubled(replica, gen, reason)

    def blocked(self, replica: str, gen: int, reason: str) -> None:
        """See ``WayObserver``."""
        held = self._held.get(replica)
        if held is not None:
            held.site.crew.blocked(replica, gen, reason)

    def noticed(self, replica: str, text: str | None) -> None:
        """See ``WayObserver``."""
        held = self._held.get(replica)
        if held is not None:
            held.site.crew.noticed(replica, text)

    # -- inside ------------------------------------------------------------------------------

    def _moment(self) -> Moment:
        return Moment(self._clock(), time.time())

    def _all_sites(self) -> list[Site]:
        with self._lock:
            return list(self._sites.values())

    def _site(self, ssh: SshSpec | None, setup: tuple[str, ...]) -> tuple[Site, bool]:
        """Find the site of a login host, or make one; whoever makes it starts it."""
        with self._lock:
            known = self._sites.get((ssh, setup))
            if known is not None:
                return known, False
            site = Site(Host(ssh, setup, self._remotes, self._clock), self, self._clock)
            self._sites[ssh, setup] = site
            return site, True

    def _recorded(self, record: Record, spec: ServiceSpec | None) -> Post | None:
        """Put a replica of an earlier backend where it belongs."""
        at = self._moment()
        post = posts.recorded(record, spec, at)
        if post is None:
            log.warning("replica %s: its record is not of a job: removed", record.replica)
            self.records.remove(record.replica)
            return None
        site, _ = self._site(post.job.ssh, post.job.setup)
        held = _Held(site, record.service, record.port, leaving=record.stopping)
        self._held[record.replica] = held
        site.crew.add(post, posts.job_of(post, at, UNCONFIRMED_MAX))
        return post

    def _reopen(self, post: Post, site: Site) -> None:
        """Take over the tunnel of an earlier backend. What it could reach counts as reachable."""
        job = site.crew.job(post.replica)
        if not post.told or job is None or job.stage is not Stage.RUNNING:
            return
        if post.job.address is None:
            return
        was_reached = post.job.endpoint is not None
        try:
            endpoint = self.ways.open(post.record)
        except SlurmgateError as error:
            log.warning("replica %s: %s", post.replica, error)
            return
        if was_reached:
            site.crew.connected(post.replica, job.gen, endpoint)

    def _reserve(self, spec: ServiceSpec, replica: str, site: Site, avoid: tuple[str, ...]) -> Post:
        """Choose the port of a replica and keep it for it."""
        with self._lock:
            if self._refusing:
                raise StartRefused("the backend is stopping")
            if replica in self._held:
                raise ValueError(f"replica {replica} was started before")
            self._routes[spec.route_name] = spec
            if spec.remote_port is None:
                port = self._free_port(spec.port_range, site)
            else:
                port = self._counted_port(spec, site)
            self._held[replica] = _Held(site, spec.name, port)
        name = JobName(self.instance, self.owner, replica, port, spec.start_hash(), spec.route_name)
        key = upstream_keys.make(spec)
        return posts.new(spec, name, self._boot, self._moment(), avoid, key)

    def _free_port(self, bounds: tuple[int, int], site: Site) -> int:
        """Choose a port that no replica there has and that was not found taken lately."""
        avoided = {held.port for held in self._held.values() if held.site is site}
        everything = range(bounds[0], bounds[1] + 1)
        for avoid in (avoided | self._found_taken(site), avoided):
            free = [port for port in everything if port not in avoid]
            if free:
                return random.choice(free)
        raise CannotStart(f"every port of port_range {bounds[0]}-{bounds[1]} is in use")

    def _counted_port(self, spec: ServiceSpec, site: Site) -> int:
        """Choose the fixed port of a service, or the first one upward that no other replica has.

        Where one replica is meant it gets that port back from one that was stopped: a script may
        know no other.
        """
        assert spec.remote_port is not None
        single = spec.replicas.max <= 1
        mine = [held for held in self._held.values() if held.service == spec.name]
        had = {held.port for held in mine if not (single and held.leaving)}
        theirs = {
            held.port
            for held in self._held.values()
            if held.site is site and held.service != spec.name
        }
        taken = self._found_taken(site) | theirs
        if single:
            taken.discard(spec.remote_port)
        for avoid in (had | taken, had):
            for port in range(spec.remote_port, HIGHEST_PORT + 1):
                if port not in avoid:
                    return port
        raise CannotStart(f"no port from {spec.remote_port} upward is free")

    def _found_taken(self, site: Site) -> set[int]:
        """Give the ports that somebody else had on a node not long ago."""
        now = self._clock()
        self._taken = {k: at for k, at in self._taken.items() if now - at < PORT_AVOIDED}
        return {port for where, port in self._taken if where is site}

    def _cancel_all(self, sites: Iterable[Site]) -> None:
        deadline = self._clock() + CANCEL_PATIENCE
        left: list[str] = []

        def cancel(site: Site) -> None:
            left.extend(site.crew.cancel_all(deadline))

        threads = [threading.Thread(target=cancel, args=(s,), daemon=True) for s in sites]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - self._clock()) + 1.0)
        if left:
            log.warning("not cancelled yet: replicas %s; the next start does it", ", ".join(left))


def _key(spec: ServiceSpec) -> SiteKey:
    return spec.ssh, spec.remote_setup
