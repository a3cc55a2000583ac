-------------------------------- MODULE MCCache --------------------------------
(* Cache within bounds: what the .cfg files beside choose from.                *)
EXTENDS Cache, TLC

CONSTANTS h1, h2, p1, c1, c2, c3

Nobody == {}
OneTarget == {h1}
TwoTargets == {h1, h2}
OnePeer == {p1}
OneStore == {"s1"}
TwoStores == {"s1", "s2"}
OneSlot == {c1}
TwoSlots == {c1, c2}
ThreeSlots == {c1, c2, c3}
OnePart == {1}
TwoParts == {1, 2}

Tokenless == {}
OneTokenEach == Holder \X {1}
TwoTokensEach == Holder \X {1, 2}
PeersToken == Peer \X {1}

\* One block, a chain, a fork, the first blocks of two tenants.
Single == {<<1>>}
Line == {<<1>>, <<1, 1>>}
Fork == {<<1>>, <<1, 1>>, <<1, 2>>}
Tenants == {<<1>>, <<2>>}

\* Holders are alike, and so are places.
Symmetry == Permutations(Target) \cup Permutations(Slot)
SlotSymmetry == Permutations(Slot)

\* Their requests are all over, each target's another one or the same: no speculation.
Knows(k) == [tip |-> k, ok |-> Len(k), kv |-> [d \in 1..Len(k) |-> Upto(k, d)], rej |-> FALSE]
Tips == {k \in Key : ~\E j \in Key : Parent(j) = k}
Settled == [Target -> {Knows(k) : k \in Tips}]

\* Targets write beside themselves, and only peers bring blocks to the other store.
AtHome(h, s) == s = "s1"

\* The deeper the block the larger.
Grows(k) == Len(k)

\* Finitely many deaths, and time is over only for the dead.
FirstDies(h) == h = h1
OnlyTheDead(s, k) == store[s].index[k].who \in down
\* Who lives gives up what it has lost, and lets be what it cannot read or has handed on.
Starved(h) == copy[h].st # "none" /\ store[copy[h].s].mem[copy[h].slot].gen # copy[h].gen
IsLost(w) == ~Leased(store[w.s], w) \/ ~Offers(w.who, w.s, w.want) \/ Starved(w.who)
IsDone(h) ==
  /\ copy[h].st # "none"
  /\ ~\E w \in wr : w.who = h
  /\ \/ \E s \in Store : s # copy[h].s /\ (There(store[s], copy[h].key) \/ store[s].gens[copy[h].key] = MaxGen)
     \/ Starved(h)
     \/ h \in Target /\ copy[h].st = "taken"

\* Narrow profiles: the others' actions left out.
No0 == FALSE
No1(x) == FALSE
No2(x, y) == FALSE
===============================================================================
