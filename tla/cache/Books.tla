--------------------------------- MODULE Books ---------------------------------
(* Keys and bytes, and the books of one store: what it becomes by each step.    *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS
  Key,        \* blocks: all tokens from the first on, which tells the tenant
  Slot,       \* places in the arena in RAM; 0 is none
  Part,       \* parts in which the bytes of a block travel
  RamRoom,    \* bytes in RAM, of each store
  DiskRoom    \* bytes on disk, of each store

-------------------------------------------------------------------------------
\* Keys and bytes

Root == <<>>
Upto(s, n) == SubSeq(s, 1, n)
Parent(k) == Upto(k, Len(k) - 1)
Tenant(k) == k[1]
\* The key under which a block is stored.
Name(k) == k

\* A block and those above it.
RECURSIVE Chain(_)
Chain(k) == IF k = Root THEN {} ELSE {k} \cup Chain(Parent(k))

\* The KV of a prefix, and where it was spoiled, if it was. A checksum stands for the bytes that have it.
Nothing == [of |-> Root, bad |-> "no"]
Bytes(k) == [of |-> k, bad |-> "no"]
Spoilt(bytes, where) == [bytes EXCEPT !.bad = where]
Nowhere == [p \in Part |-> Nothing]
Whole(bytes) == [p \in Part |-> bytes]
Size(k) == 1

RECURSIVE Sum(_, _)
Sum(size, places) ==
  IF places = {} THEN 0 ELSE LET x == CHOOSE x \in places : TRUE IN size[x] + Sum(size, places \ {x})

-------------------------------------------------------------------------------
\* One store

Absent == [st |-> "absent", gen |-> 0, who |-> "nobody", size |-> 0, sum |-> Nothing, ram |-> 0, disk |-> FALSE, refs |-> 0]
EmptyCell == [key |-> Root, gen |-> 0, size |-> 0, parts |-> Nowhere]
NoCopy == [gen |-> 0, size |-> 0, sum |-> Nothing, bytes |-> Nothing]
EmptyStore ==
  [index |-> [k \in Key |-> Absent],        \* block by key
   gens  |-> [k \in Key |-> 0],             \* the last generation of each key
   mem   |-> [c \in Slot |-> EmptyCell],
   disk  |-> [k \in Key |-> NoCopy],        \* outlives the process
   pins  |-> {},
   dead  |-> {},                            \* blocks that are no longer found, and whose bytes are pinned
   moves |-> {},                            \* copies between RAM and disk under way
   ram   |-> 0, room |-> 0]                 \* bytes taken in RAM; on disk

Sealed(S, k) == S.index[k].st = "sealed"
Writing(S, k) == S.index[k].st = "writing"
There(S, k) == S.index[k].st # "absent"
HasChild(S, k) == \E j \in Key : There(S, j) /\ Parent(j) = k
Below(S, k) == {j \in Key : There(S, j) /\ k \in Chain(j)}
NextGen(S, k) == S.gens[k] + 1

\* A place in RAM that a new copy may take.
Places(S, size) == IF S.ram + size > RamRoom THEN {} ELSE {c \in Slot : S.mem[c].gen = 0}
Freed(S, places) ==
  [S EXCEPT !.mem = [c \in Slot |-> IF c \in places THEN EmptyCell ELSE S.mem[c]],
            !.ram = @ - Sum([c \in places |-> S.mem[c].size], places)]
Taken(S, c, k, gen, size) ==
  [S EXCEPT !.mem[c] = [key |-> k, gen |-> gen, size |-> size, parts |-> Nowhere], !.ram = @ + size]

\* A copy from one tier to the other is under way, for the block as it is now.
Current(S, m) == Sealed(S, m.key) /\ S.index[m.key].gen = m.gen
Under(S, kind, ks) == {m \in S.moves : m.kind = kind /\ m.key \in ks /\ Current(S, m)}
Moving(S, kind, k) == Under(S, kind, {k}) # {}

\* What a block takes in each tier, copies under way included.
PlacesOf(S, k) == ({S.index[k].ram} \cup {m.slot : m \in Under(S, "promote", {k})}) \ {0}
RoomOf(S, k) == S.disk[k].size + (IF Moving(S, "spill", k) THEN S.index[k].size ELSE 0)

\* These leave the index, and with them what they take, but for those that are pinned.
Stays(S, k) == S.index[k].refs > 0
Remains(S, k) ==
  [key |-> k, gen |-> S.index[k].gen, refs |-> S.index[k].refs, places |-> PlacesOf(S, k), room |-> RoomOf(S, k)]
Dropped(S, ks) ==
  LET kept == {k \in ks : Stays(S, k)}
      gone == ks \ kept
      out == [S EXCEPT !.index = [k \in Key |-> IF k \in ks THEN Absent ELSE S.index[k]],
                       !.disk = [k \in Key |-> IF k \in ks THEN NoCopy ELSE S.disk[k]],
                       !.dead = @ \cup {Remains(S, k) : k \in kept},
                       !.room = @ - Sum([k \in gone |-> RoomOf(S, k)], gone)]
  IN Freed(out, UNION {PlacesOf(S, k) : k \in gone})

\* Lookup: the longest sealed prefix.
Found(S, k) == {j \in Chain(k) : \A i \in Chain(j) : Sealed(S, Name(i))}
Pinned(S, t, ks) ==
  [S EXCEPT !.index = [k \in Key |-> IF k \in ks THEN [S.index[k] EXCEPT !.refs = @ + 1] ELSE S.index[k]],
            !.pins = @ \cup {[tok |-> t, key |-> k, gen |-> S.index[k].gen] : k \in ks}]

PinsOf(S, t) == {p \in S.pins : p.tok = t}
\* The pins are gone; what nobody can find and nobody has pinned any more goes with them.
Unpinned(S, pins) ==
  LET on(k, gen) == \E p \in pins : p.key = k /\ p.gen = gen
      index == [k \in Key |-> IF on(k, S.index[k].gen) THEN [S.index[k] EXCEPT !.refs = @ - 1] ELSE S.index[k]]
      dead == {IF on(d.key, d.gen) THEN [d EXCEPT !.refs = @ - 1] ELSE d : d \in S.dead}
      over == {d \in dead : d.refs = 0}
      out == [S EXCEPT !.index = index, !.pins = @ \ pins, !.dead = dead \ over,
                       !.room = @ - Sum([d \in over |-> d.room], over)]
  IN Freed(out, UNION {d.places : d \in over})

\* A release carries the token, and the token alone says what ends.
Ended(S, t) == PinsOf(S, t)
Lapsed(S, t) == Unpinned(S, PinsOf(S, t))

\* Reserve
MayFollow(S, k, h) ==
  Parent(k) # Root => IF Writing(S, Parent(k)) THEN S.index[Parent(k)].who = h ELSE Sealed(S, Parent(k))
MayReserve(S, k, h) == ~There(S, k)
Reserved(S, k, h, c, size) ==
  LET gen == NextGen(S, k) IN
  [Taken(S, c, k, gen, size) EXCEPT !.gens[k] = gen,
     !.index[k] = [Absent EXCEPT !.st = "writing", !.gen = gen, !.who = h, !.size = size, !.ram = c]]

\* A lease holds while its block is being written in its generation.
Leased(S, w) == Writing(S, w.key) /\ S.index[w.key].gen = w.gen
ParentSealed(S, k) == Parent(k) # Root => Sealed(S, Parent(k))
Arrived(S, k, sum) == S.mem[S.index[k].ram].parts = Whole(sum)
MaySeal(S, w, sum) == Leased(S, w) /\ ParentSealed(S, w.key) /\ Arrived(S, w.key, sum)
SealedAs(S, k, sum) == [S EXCEPT !.index[k].st = "sealed", !.index[k].sum = sum, !.index[k].who = "nobody"]
\* Where the bytes of a lease go.
Goes(S, w) == IF Leased(S, w) THEN {S.index[w.key].ram} ELSE {}
\* What cannot be sealed any more once this is gone.
Orphans(S, k) == Below(S, k)
Abandons(S, w) == IF Leased(S, w) THEN Orphans(S, w.key) ELSE {}

\* Eviction: a tier's copy goes, and with the last of them the block.
Unused(S, k) == S.index[k].refs = 0
Leaf(S, k) == ~HasChild(S, k)
MayEvictRam(S, k) == Sealed(S, k) /\ S.index[k].ram # 0 /\ Unused(S, k) /\ (S.index[k].disk \/ Leaf(S, k))
EvictedRam(S, k) ==
  IF S.index[k].disk THEN [Freed(S, {S.index[k].ram}) EXCEPT !.index[k].ram = 0] ELSE Dropped(S, {k})
MayEvictDisk(S, k) ==
  /\ Sealed(S, k) /\ S.index[k].disk /\ ~Moving(S, "promote", k)
  /\ S.index[k].ram # 0 \/ (Unused(S, k) /\ Leaf(S, k))
EvictedDisk(S, k) ==
  IF S.index[k].ram # 0 THEN [S EXCEPT !.index[k].disk = FALSE, !.disk[k] = NoCopy, !.room = @ - S.disk[k].size] ELSE Dropped(S, {k})

\* Copies between the tiers. They take room where they go to, and keep nothing where they come from: the block may be
\* gone, and there anew, before they end.
Move(kind, k, S, c) == [kind |-> kind, key |-> k, gen |-> S.index[k].gen, slot |-> c, size |-> S.index[k].size]
MaySpill(S, k) ==
  /\ Sealed(S, k) /\ S.index[k].ram # 0 /\ ~S.index[k].disk /\ ~Moving(S, "spill", k)
  /\ S.room + S.index[k].size <= DiskRoom
Spilling(S, k) ==
  [S EXCEPT !.moves = @ \cup {Move("spill", k, S, S.index[k].ram)}, !.room = @ + S.index[k].size]
Intact(S, k) == S.mem[S.index[k].ram].parts = Whole(S.index[k].sum)
Copied(S, k) ==
  LET b == S.index[k] IN
  [gen |-> b.gen, size |-> b.size, sum |-> b.sum, bytes |-> IF Intact(S, k) THEN b.sum ELSE Spoilt(b.sum, "ram")]
Enters(S, m) ==
  [S EXCEPT !.moves = @ \ {m}, !.index[m.key].disk = TRUE, !.disk[m.key] = [Copied(S, m.key) EXCEPT !.gen = m.gen]]
Fails(S, m) == [S EXCEPT !.moves = @ \ {m}, !.room = @ - m.size]
\* It comes too late.
Misses(S, m) == [S EXCEPT !.moves = @ \ {m}]
Spilled(S, m, ok) == IF ~Current(S, m) THEN Misses(S, m) ELSE IF ok THEN Enters(S, m) ELSE Fails(S, m)

MayPromote(S, k) == Sealed(S, k) /\ S.index[k].ram = 0 /\ S.index[k].disk /\ ~Moving(S, "promote", k)
Promoting(S, k, c) ==
  LET b == S.index[k] IN
  [Taken(S, c, k, b.gen, b.size) EXCEPT !.moves = @ \cup {Move("promote", k, S, c)}]
Right(bytes, sum) == bytes = sum
Rises(S, m) ==
  LET k == m.key IN
  [S EXCEPT !.moves = @ \ {m}, !.index[k].ram = m.slot, !.mem[m.slot].parts = Whole(S.disk[k].bytes)]
Promoted(S, m, ok) ==
  IF ~Current(S, m) THEN Misses(S, m)
  ELSE IF ok /\ Right(S.disk[m.key].bytes, S.disk[m.key].sum) THEN Rises(S, m)
  ELSE Freed(Misses(S, m), {m.slot})

\* Some copy of the block does not have its checksum.
Spoiled(S, k) ==
  /\ Sealed(S, k)
  /\ \/ S.index[k].ram # 0 /\ ~Intact(S, k)
     \/ S.index[k].disk /\ S.disk[k].bytes # S.disk[k].sum
Doomed(S, k) == Below(S, k)

\* What a new process finds: of the blocks on disk those whose ancestors are all there.
Restorable(S) == {k \in Key : \A j \in Chain(k) : S.disk[j].gen > 0}
Counted(S) == S.gens
Restored(S) ==
  LET ks == Restorable(S)
      entry(k) == [Absent EXCEPT !.st = "sealed", !.gen = S.disk[k].gen, !.size = S.disk[k].size,
                                 !.sum = S.disk[k].sum, !.disk = TRUE]
  IN [EmptyStore EXCEPT !.gens = Counted(S),
        !.index = [k \in Key |-> IF k \in ks THEN entry(k) ELSE Absent],
        !.disk = [k \in Key |-> IF k \in ks THEN S.disk[k] ELSE NoCopy],
        !.room = Sum([k \in ks |-> S.disk[k].size], ks)]
===============================================================================
