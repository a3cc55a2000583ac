------------------------------- MODULE SIMCache --------------------------------
(* Random behaviours of a model too big to go through: two stores with two      *)
(* tiers, a fork and another tenant, two targets that speculate, a peer.        *)
EXTENDS MCCache

Both == Fork \cup {<<2>>, <<2, 1>>}

\* Left to chance alone little is ever written, and what is goes at once: time is over, and bytes go, for want of room.
Pressed(s) == store[s].ram + 1 > RamRoom
SeldomLapses(s, k) == Pressed(s) \/ store[s].index[k].who \in down
EvictsForRoom(s, k) == (Pressed(s) /\ EvictRam(s, k)) \/ (store[s].room = DiskRoom /\ EvictDisk(s, k))
DiesLate(h) == tgt[h].ok > 1
LeavesLate(h) == copy[h].st = "taken" \/ Starved(h)
===============================================================================
