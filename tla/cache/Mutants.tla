-------------------------------- MODULE Mutants --------------------------------
(* Deliberate bugs. Each definition stands for one of Cache's, which a line in  *)
(* manifest.toml replaces by it; a named property must then be violated.        *)
EXTENDS MCCache

Always1(x) == TRUE
Always2(x, y) == TRUE
Always3(x, y, z) == TRUE

\* Finding and pinning ---------------------------------------------------------

\* What is being written is found.
FindsWritten(S, k) == {j \in Chain(k) : \A i \in Chain(j) : There(S, Name(i))}
PinsNothing(S, t, ks) == S

\* What a release says is taken at its word, however often it comes.
ReleasesAgain(S, t) == {[tok |-> t, key |-> x.key, gen |-> x.gen] : x \in Hand(t).at}
\* It ends whatever its holder has pinned under these keys.
ReleasesByName(S, t) == {p \in S.pins : Owner(p.tok) = Owner(t) /\ \E x \in Hand(t).at : x.key = p.key}
ForgetsCount(S, t) == [S EXCEPT !.pins = @ \ PinsOf(S, t)]

\* The reader trusts its pin, whose time may be over.
ChecksNothing(x) == \A p \in Part : x.parts[p] # Nothing

\* Writing ---------------------------------------------------------------------

LeasesToAll(S, k, h) == ~Sealed(S, k)
AnyLease(S, w) == Writing(S, w.key)
GivesUpAny(S, w) == IF Writing(S, w.key) THEN Orphans(S, w.key) ELSE {}
\* All bytes came; which ones is not looked at. Some bytes came.
AnyBytes(S, k, sum) == \A p \in Part : S.mem[S.index[k].ram].parts[p] # Nothing
SomeBytes(S, k, sum) == \E p \in Part : S.mem[S.index[k].ram].parts[p] = sum
\* The writer has the arena mapped and goes on after its lease.
WhereItWas(S, w) == {w.slot}
OnlyItself(S, k) == {k}
ReadsUnpinned(S, t, x) == Sealed(S, x.key)

\* Keys ------------------------------------------------------------------------

WithoutTenant(k) == [k EXCEPT ![1] = 1]
WithoutParent(k) == <<k[Len(k)]>>

\* Targets ---------------------------------------------------------------------

SampledIsReady(h) == Len(tgt[h].tip)
KeepsRejected(kv, n) == kv
DropsDeepest(kv, n) == Upto(kv, Len(kv) - 1)

\* Eviction --------------------------------------------------------------------

Never2(S, k) == FALSE
KeepsIndex(S, k) == Freed(S, {S.index[k].ram})
KeepsRoom(S, places) == [S EXCEPT !.mem = [c \in Slot |-> IF c \in places THEN EmptyCell ELSE S.mem[c]]]
\* What is on its way to disk is taken for being there.
CountsOnSpill(S, k) ==
  IF S.index[k].disk \/ Moving(S, "spill", k)
  THEN [Freed(S, {S.index[k].ram}) EXCEPT !.index[k].ram = 0] ELSE Dropped(S, {k})

\* Tiers -----------------------------------------------------------------------

\* A copy is entered whatever has become of the block: its key is the same.
SpillsAny(S, m, ok) == IF ok /\ Sealed(S, m.key) THEN Enters(S, m) ELSE Misses(S, m)
\* So are bytes that come back.
RisesAny(S, m, ok) == IF Sealed(S, m.key) THEN Rises(S, m) ELSE Misses(S, m)
KeepsItsRoom(S, m) == Misses(S, m)
\* Nobody ends a copy whose block has gone.
Waits(S, m) == S
RestoresAll(S) == {k \in Key : S.disk[k].gen > 0}
StartsAnew(S) == [k \in Key |-> S.disk[k].gen]
KeepsDead(S, pins) ==
  LET on(k, gen) == \E p \in pins : p.key = k /\ p.gen = gen IN
  [S EXCEPT !.pins = @ \ pins,
            !.index = [k \in Key |-> IF on(k, S.index[k].gen) THEN [S.index[k] EXCEPT !.refs = @ - 1] ELSE S.index[k]]]

\* Transfers -------------------------------------------------------------------

\* The peer declares the checksum of what it has got, not of what it was told.
SumsItself(w) ==
  IF w.who \in Peer THEN copy[w.who].parts[CHOOSE p \in Part : TRUE] ELSE Bytes(tgt[w.who].kv[Len(w.want)])
WaitsForSource(h) ==
  /\ copy[h].st # "none"
  /\ ~\E w \in wr : w.who = h
  /\ \/ \E s \in Store : s # copy[h].s /\ (There(store[s], copy[h].key) \/ store[s].gens[copy[h].key] = MaxGen)
     \/ h \in Target /\ copy[h].st = "taken"
WaitsForLease(w) == ~Leased(store[w.s], w) \/ ~Offers(w.who, w.s, w.want)
===============================================================================
