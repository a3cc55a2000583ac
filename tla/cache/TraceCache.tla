------------------------------ MODULE TraceCache -------------------------------
(* Whether what a store told of itself is a behaviour of Cache. TraceData, which *)
(* is written for each run, holds its transitions in the order in which they     *)
(* happened; keys, holders, places and generations are numbers there, and all    *)
(* bytes are what they should be.                                                *)
(*                                                                               *)
(* What the store does not tell is little: a part that arrived may be one of     *)
(* many, and a pin whose time is over counts no more before it is swept out. So  *)
(* each state has one successor, and the first event that has none is the one    *)
(* to look at.                                                                   *)
EXTENDS Cache, TraceData, TLC

VARIABLES
  at,      \* the event to explain next
  leases   \* the number of each lease

Here == "store"
S == store[Here]
Event == TraceLog[at]
Is(name) == at <= Len(TraceLog) /\ Event.ev = name /\ at' = at + 1

\* Keys are numbers, and TraceData says what is above each.
TraceKeys == 1..Len(ParentOf)
TraceRoot == 0
TraceParent(k) == ParentOf[k]
TraceStores == {Here}
TraceTargets == 1..Holders
TracePeers == {}
TraceTokens == (1..Holders) \X (1..Lookups)
TraceSlots == 1..Slots
TraceParts == {1}
\* Whoever reserves has the KV.
TraceOffers(h, s, k) == TRUE
TraceContent(w, p) == Bytes(w.want)
TraceDeclared(w) == Bytes(w.want)
TraceBegins == {[h \in Target |-> Unborn]}
\* What the event says.
TraceSize(k) == Event.size
TraceGen(T, k) == Event.gen
TracePlaces(T, size) == IF T.ram + size <= RamRoom /\ T.mem[Event.slot].gen = 0 THEN {Event.slot} ELSE {}
TraceFresh(t) == Hand(t).st = "none"

-------------------------------------------------------------------------------
\* What is not told

\* Pins on this block whose time was over when it was evicted: they count no more, and are swept out later.
Old(t) == {p \in PinsOf(S, t) : p.key = Event.key /\ p.gen = Event.gen}
Overdue == {t \in Event.over : Old(t) # {}}
Sweeps == at <= Len(TraceLog) /\ Event.ev = "Evict" /\ Overdue # {}
Hidden ==
  /\ Sweeps
  /\ \E t \in {CHOOSE t \in Overdue : TRUE} :
       /\ Becomes(Here, Unpinned(S, Old(t)))
       /\ hand' = [hand EXCEPT ![t[1]][t[2]].at = {x \in @ : x.key # Event.key \/ x.gen # Event.gen}]
  /\ UNCHANGED <<wr, copy, tgt, down, faults, at, leases>>

-------------------------------------------------------------------------------
\* What is told

Now(k, gen) == There(S, k) /\ S.index[k].gen = gen
Lease(number) == {x \in leases : x.number = number /\ x.key = Event.key /\ x.gen = Event.gen}
Handles == {w \in wr : w.key = Event.key /\ w.gen = Event.gen}
IsLeased == Lease(Event.lease) # {} /\ Handles # {}
W == CHOOSE w \in Handles : TRUE
NoLease == leases' = leases

Blocks == {Event.at[i].key : i \in 1..Len(Event.at)}
Last == Event.at[Len(Event.at)].key
TLookup ==
  /\ Is("Lookup") /\ NoLease
  /\ Found(S, Last) = Blocks
  /\ \A i \in 1..Len(Event.at) : Now(Event.at[i].key, Event.at[i].gen)
  /\ Lookup(Here, Event.tok, Last)

TRead ==
  /\ Is("Read") /\ NoLease
  /\ Hand(Event.tok).st = "held" /\ MayRead(S, Event.tok, [key |-> Event.key, gen |-> Event.gen])
  /\ UNCHANGED vars

TReserve ==
  /\ Is("Reserve") /\ Reserve(Here, Event.who, Event.key)
  /\ S.gens[Event.key] < Event.gen
  /\ ~\E x \in leases : x.number = Event.lease
  /\ leases' = leases \cup {[number |-> Event.lease, key |-> Event.key, gen |-> Event.gen]}
\* Its holder asks again for what it is writing.
TRenew ==
  /\ Is("Reserve") /\ NoLease /\ IsLeased /\ Leased(S, W)
  /\ S.index[Event.key].who = Event.who /\ S.index[Event.key].ram = Event.slot
  /\ UNCHANGED vars

TWrite ==
  /\ Is("Write") /\ NoLease /\ IsLeased /\ Leased(S, W)
  /\ store' = [store EXCEPT ![Here].mem[Event.slot].parts[1] = Bytes(Event.key)]
  /\ S.index[Event.key].ram = Event.slot
  /\ UNCHANGED <<hand, wr, copy, tgt, down, faults>>
TSeal == Is("Seal") /\ NoLease /\ IsLeased /\ Seal(W)

TRelease == Is("Release") /\ NoLease /\ Release(Event.tok)
TGiveUp == Is("GiveUp") /\ NoLease /\ IsLeased /\ Leased(S, W) /\ Orphans(S, Event.key) = {Event.key} /\ GiveUp(W)
\* Time is over, says the clock.
TExpire == Is("Expire") /\ NoLease /\ Event.due /\ Expire(Event.tok)
TLapse ==
  /\ Is("Lapse") /\ NoLease /\ IsLeased /\ Now(Event.key, Event.gen)
  /\ Orphans(S, Event.key) = {Event.key} /\ Event.due
  /\ Lapse(Here, Event.key)
\* With its parent, whose time is over, goes what is below it.
TOrphan ==
  /\ Is("Lapse") /\ NoLease /\ IsLeased /\ ~Event.due
  /\ Orphans(S, Event.key) = {Event.key} /\ Parent(Event.key) # Root /\ Writing(S, Parent(Event.key))
  /\ Lapse(Here, Event.key)

TEvict ==
  /\ Is("Evict") /\ NoLease /\ Now(Event.key, Event.gen)
  /\ IF Event.tier = "ram" THEN EvictRam(Here, Event.key) ELSE EvictDisk(Here, Event.key)
  /\ Event.gone = ~There(store'[Here], Event.key)

Moves(kind) == {m \in S.moves : m.kind = kind /\ m.key = Event.key}
TSpill == Is("Spill") /\ NoLease /\ Now(Event.key, Event.gen) /\ Spill(Here, Event.key)
TSpilled ==
  /\ Is("Spilled") /\ NoLease
  /\ \E m \in Moves("spill") : m.gen = Event.gen /\ (Event.ok => Current(S, m)) /\ EndSpill(Here, m, Event.ok)
TPromote == Is("Promote") /\ NoLease /\ Now(Event.key, Event.gen) /\ Promote(Here, Event.key)
TPromoted ==
  /\ Is("Promoted") /\ NoLease
  /\ \E m \in Moves("promote") : m.slot = Event.slot /\ (Event.ok => Current(S, m)) /\ EndPromote(Here, m, Event.ok)

\* That bytes turned bad is only seen by this. Each block is told by itself, the deepest first.
TCondemn ==
  /\ Is("Condemn") /\ NoLease /\ Now(Event.key, Event.gen) /\ Below(S, Event.key) = {Event.key}
  /\ Becomes(Here, Dropped(S, {Event.key}))
  /\ wr' = Over(Here, {Event.key}, wr)
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

\* A new process: what it found of the disk.
TRestore ==
  /\ Is("Restore") /\ leases' = {}
  /\ Crash(Here, {k \in Key : S.disk[k].gen > 0} \ Blocks, {k \in Blocks : Moving(S, "spill", k)})
  /\ \A i \in 1..Len(Event.at) : store'[Here].index[Event.at[i].key].gen = Event.at[i].gen
  /\ {k \in Key : There(store'[Here], k)} = Blocks

Reported ==
  /\ \/ TLookup \/ TRead \/ TReserve \/ TRenew \/ TWrite \/ TSeal \/ TRelease \/ TGiveUp \/ TExpire \/ TLapse \/ TOrphan
     \/ TEvict \/ TSpill \/ TSpilled \/ TPromote \/ TPromoted \/ TCondemn \/ TRestore
  /\ store'[Here].ram = Event.ram /\ store'[Here].room = Event.disk

\* What the disk held before the first process that is recorded.
Before ==
  LET of(k) == {i \in 1..Len(OnDisk) : OnDisk[i].key = k}
      copied(k) == OnDisk[CHOOSE i \in of(k) : TRUE]
      disk == [k \in Key |-> IF of(k) = {} THEN NoCopy
                             ELSE [gen |-> copied(k).gen, size |-> copied(k).size, sum |-> Bytes(k), bytes |-> Bytes(k)]]
      index == [k \in Key |-> IF of(k) = {} THEN Absent
                              ELSE [Absent EXCEPT !.st = "sealed", !.gen = copied(k).gen, !.size = copied(k).size,
                                                  !.sum = Bytes(k), !.disk = TRUE]]
  IN [EmptyStore EXCEPT !.disk = disk, !.index = index, !.gens = [k \in Key |-> index[k].gen],
                        !.room = Sum([k \in Key |-> disk[k].size], Key)]

TraceInit ==
  /\ store = [s \in Store |-> Before]
  /\ hand = [h \in Holder |-> [n \in Number |-> Unissued]]
  /\ wr = {}
  /\ copy = [h \in Holder |-> NotReading]
  /\ tgt \in Begins
  /\ down = {}
  /\ faults = [flips |-> 0, crashes |-> 0]
  /\ at = 1 /\ leases = {} /\ TLCSet(1, 0)
TraceNext == Hidden \/ (~Sweeps /\ Reported)
TraceSpec == TraceInit /\ [][TraceNext]_<<vars, at, leases>>

\* A constraint, since it is then looked at in states that were reached, and not in those that were tried.
Progress == IF at - 1 > TLCGet(1) THEN TLCSet(1, at - 1) /\ PrintT(<<"explained", at - 1>>) ELSE TRUE
===============================================================================
