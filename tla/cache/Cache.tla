--------------------------------- MODULE Cache ---------------------------------
(* The cache protocol: who may write, read and drop which block of keys and     *)
(* values (KV). DESIGN.md section 7; the table in README.md says which Python   *)
(* carries out which action.                                                    *)
EXTENDS Books

CONSTANTS
  Store,      \* stores; more than one where blocks travel between them
  Target,     \* holders that compute blocks, write and read them
  Peer,       \* holders that bring blocks from one store to another
  Token,      \* what look-ups return: pins are held by it
  MaxGen,     \* how often a block may be written anew
  MaxFlips,   \* how often bytes may turn bad
  MaxCrashes  \* how often a store may die

VARIABLES
  store,   \* each store: its index, generations, RAM, disk, pins, and copies under way
  hand,    \* what each holder's tokens stand for, as it knows it
  wr,      \* leases as their holders know them; one may be over long since
  copy,    \* what a reader has copied out of shared memory
  tgt,     \* each target: tokens sampled, how many of them are committed, and its own KV of them
  down,    \* targets that died
  faults   \* how much went wrong

vars == <<store, hand, wr, copy, tgt, down, faults>>
Holder == Target \cup Peer

-------------------------------------------------------------------------------
\* Targets: they sample ahead of what is committed, and store only what is.

\* rej: some of what it sampled was rejected.
Unborn == [tip |-> Root, ok |-> 0, kv |-> <<>>, rej |-> FALSE]
Begins == {[h \in Target |-> Unborn]}

Computed(kv, k) == IF Len(kv) < Len(k) THEN Append(kv, k) ELSE kv
RolledBack(kv, n) == Upto(kv, n)

Speculate(h, k) ==
  /\ h \notin down /\ Parent(k) = tgt[h].tip
  /\ tgt' = [tgt EXCEPT ![h].tip = k, ![h].kv = Computed(@, k)]
  /\ UNCHANGED <<store, hand, wr, copy, down, faults>>

Accept(h) ==
  /\ h \notin down /\ tgt[h].ok < Len(tgt[h].tip)
  /\ tgt' = [tgt EXCEPT ![h].ok = @ + 1]
  /\ UNCHANGED <<store, hand, wr, copy, down, faults>>

Reject(h) ==
  /\ h \notin down /\ tgt[h].ok < Len(tgt[h].tip)
  /\ tgt' = [tgt EXCEPT ![h].tip = Upto(@, tgt[h].ok), ![h].kv = RolledBack(@, tgt[h].ok),
                           ![h].rej = TRUE]
  /\ UNCHANGED <<store, hand, wr, copy, down, faults>>

MayDie(h) == TRUE
Die(h) ==
  /\ h \notin down /\ MayDie(h)
  /\ down' = down \cup {h}
  /\ UNCHANGED <<store, hand, wr, copy, tgt, faults>>

Ready(h) == tgt[h].ok
Committed == UNION {{Upto(tgt[h].tip, d) : d \in 1..tgt[h].ok} : h \in Target}

-------------------------------------------------------------------------------
\* Writing

Becomes(s, S) == store' = [store EXCEPT ![s] = S]

NoToken == <<"nobody", 0>>
NotReading == [st |-> "none", s |-> "nowhere", tok |-> NoToken, want |-> Root, key |-> Root, gen |-> 0, slot |-> 0,
               sum |-> Nothing, parts |-> Nowhere]

\* What a holder has to write: a target its own KV, a peer what it has copied from another store.
Brings(h, s, k) == copy[h].st # "none" /\ copy[h].want = k /\ copy[h].s # s
Local(h, s) == TRUE
Offers(h, s, k) ==
  IF h \in Peer THEN Brings(h, s, k)
  ELSE h \notin down /\ Local(h, s) /\ Len(k) <= Ready(h) /\ k = Upto(tgt[h].tip, Len(k))
Content(w, p) == IF w.who \in Peer THEN copy[w.who].parts[p] ELSE Bytes(tgt[w.who].kv[Len(w.want)])
Declared(w) == IF w.who \in Peer THEN copy[w.who].sum ELSE Bytes(tgt[w.who].kv[Len(w.want)])

Reserve(s, h, k) ==
  LET S == store[s] n == Name(k) IN
  /\ Offers(h, s, k) /\ ~\E w \in wr : w.live /\ w.s = s /\ w.who = h /\ w.want = k
  /\ MayReserve(S, n, h) /\ MayFollow(S, n, h) /\ S.gens[n] < MaxGen
  /\ \E c \in Places(S, Size(k)) :
       /\ Becomes(s, Reserved(S, n, h, c, Size(k)))
       /\ wr' = wr \cup {[s |-> s, who |-> h, want |-> k, key |-> n, gen |-> NextGen(S, n), slot |-> c, live |-> TRUE]}
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

\* One part's bytes arrive, or what was left of them on the way.
Write(w, p, bytes) ==
  LET S == store[w.s] IN
  /\ w \in wr /\ Offers(w.who, w.s, w.want) /\ Content(w, p) # Nothing
  /\ \E c \in Goes(S, w) : S.mem[c].parts[p] # bytes /\ Becomes(w.s, [S EXCEPT !.mem[c].parts[p] = bytes])
  /\ UNCHANGED <<hand, wr, copy, tgt, down>>
Writes(w, p) == Write(w, p, Content(w, p)) /\ UNCHANGED faults
Garbles(w, p) ==
  /\ faults.flips < MaxFlips /\ faults' = [faults EXCEPT !.flips = @ + 1]
  /\ Write(w, p, Spoilt(Content(w, p), "wire"))

Others(w) == wr \ {w}
\* The leases on these blocks are over; who holds one does not hear of it.
Over(s, ks, all) == {IF w.s = s /\ w.key \in ks THEN [w EXCEPT !.live = FALSE] ELSE w : w \in all}

Seal(w) ==
  LET S == store[w.s] IN
  /\ w \in wr /\ Offers(w.who, w.s, w.want) /\ MaySeal(S, w, Declared(w))
  /\ Becomes(w.s, SealedAs(S, w.key, Declared(w)))
  /\ wr' = Others(w)
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

\* The holder gives its lease back, or hears that it has none.
MayGiveUp(w) == TRUE
GiveUp(w) ==
  LET S == store[w.s] ks == Abandons(S, w) IN
  /\ w \in wr /\ w.who \notin down /\ MayGiveUp(w)
  /\ Becomes(w.s, Dropped(S, ks))
  /\ wr' = {v \in Others(w) : v.who # w.who} \cup Over(w.s, ks, {v \in Others(w) : v.who = w.who})
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

MayLapse(s, k) == TRUE

Lapse(s, k) ==
  LET S == store[s] ks == Orphans(S, k) IN
  /\ Writing(S, k) /\ MayLapse(s, k)
  /\ Becomes(s, Dropped(S, ks))
  /\ wr' = Over(s, ks, wr)
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

-------------------------------------------------------------------------------
\* Reading

Unissued == [st |-> "none", s |-> "nowhere", at |-> {}]
\* A token is its holder and a number.
Owner(t) == t[1]
Number == {t[2] : t \in Token}
Hand(t) == hand[t[1]][t[2]]
Fresh(t) == Hand(t).st = "none" /\ \A u \in Token : u[1] = t[1] /\ u[2] < t[2] => Hand(u).st # "none"

Lookup(s, t, k) ==
  LET S == store[s] found == Found(S, k) IN
  /\ Fresh(t) /\ Owner(t) \notin down /\ found # {}
  /\ Becomes(s, Pinned(S, t, {Name(j) : j \in found}))
  /\ hand' = [hand EXCEPT ![t[1]][t[2]] =
       [st |-> "held", s |-> s, at |-> {[want |-> j, key |-> Name(j), gen |-> S.index[Name(j)].gen] : j \in found}]]
  /\ UNCHANGED <<wr, copy, tgt, down, faults>>

\* The message may come twice, and late.
Release(t) ==
  LET S == store[Hand(t).s] IN
  /\ Hand(t).st # "none" /\ Owner(t) \notin down
  /\ hand' = [hand EXCEPT ![t[1]][t[2]].st = "released"]
  /\ Becomes(Hand(t).s, Unpinned(S, Ended(S, t)))
  /\ UNCHANGED <<wr, copy, tgt, down, faults>>

\* The pin's time is over; its holder may think otherwise.
Expire(t) ==
  LET S == store[Hand(t).s] IN
  /\ Hand(t).st = "held"
  /\ hand' = [hand EXCEPT ![t[1]][t[2]].st = "lapsed"]
  /\ Becomes(Hand(t).s, Lapsed(S, t))
  /\ UNCHANGED <<wr, copy, tgt, down, faults>>

\* The reader is told where the bytes are, and what their checksum is.
MayRead(S, t, x) ==
  [tok |-> t, key |-> x.key, gen |-> x.gen] \in S.pins /\ Sealed(S, x.key) /\ S.index[x.key].gen = x.gen
Open(t, x) ==
  LET h == Owner(t) S == store[Hand(t).s] IN
  /\ h \notin down /\ copy[h].st = "none" /\ Hand(t).st \in {"held", "lapsed"} /\ x \in Hand(t).at
  /\ MayRead(S, t, x) /\ S.index[x.key].ram # 0
  /\ copy' = [copy EXCEPT ![h] =
       [st |-> "copying", s |-> Hand(t).s, tok |-> t, want |-> x.want, key |-> x.key, gen |-> x.gen,
        slot |-> S.index[x.key].ram, sum |-> S.index[x.key].sum, parts |-> Nowhere]]
  /\ UNCHANGED <<store, hand, wr, tgt, down, faults>>

\* Out of shared memory: nobody asks the store.
Copy(h, p) ==
  LET x == copy[h] IN
  /\ h \notin down /\ x.st = "copying" /\ x.parts[p] = Nothing
  /\ copy' = [copy EXCEPT ![h].parts[p] = store[x.s].mem[x.slot].parts[p]]
  /\ copy' # copy
  /\ UNCHANGED <<store, hand, wr, tgt, down, faults>>

\* The checksum is that of the reader's own copy.
Checks(x) == x.parts = Whole(x.sum)
Take(h) ==
  /\ h \notin down /\ copy[h].st = "copying" /\ Checks(copy[h])
  /\ copy' = [copy EXCEPT ![h].st = "taken"]
  /\ UNCHANGED <<store, hand, wr, tgt, down, faults>>

\* It has used it, or lets it be: a miss.
MayLeave(h) == TRUE
Leave(h) ==
  /\ copy[h].st # "none" /\ MayLeave(h)
  /\ copy' = [copy EXCEPT ![h] = NotReading]
  /\ UNCHANGED <<store, hand, wr, tgt, down, faults>>

-------------------------------------------------------------------------------
\* Stores

OnStore(s, S) == Becomes(s, S) /\ UNCHANGED <<hand, wr, copy, tgt, down, faults>>

EvictRam(s, k) == MayEvictRam(store[s], k) /\ OnStore(s, EvictedRam(store[s], k))
EvictDisk(s, k) == MayEvictDisk(store[s], k) /\ OnStore(s, EvictedDisk(store[s], k))
Spill(s, k) == MaySpill(store[s], k) /\ OnStore(s, Spilling(store[s], k))
EndSpill(s, m, ok) == m \in store[s].moves /\ m.kind = "spill" /\ OnStore(s, Spilled(store[s], m, ok))
Promote(s, k) ==
  LET S == store[s] IN
  MayPromote(S, k) /\ \E c \in Places(S, S.index[k].size) : OnStore(s, Promoting(S, k, c))
EndPromote(s, m, ok) == m \in store[s].moves /\ m.kind = "promote" /\ OnStore(s, Promoted(store[s], m, ok))

\* Bytes in RAM or on disk turn bad.
Flip(s, k) ==
  LET S == store[s] IN
  /\ faults.flips < MaxFlips /\ Sealed(S, k)
  /\ \/ /\ S.index[k].ram # 0
        /\ \E p \in Part : Becomes(s, [S EXCEPT !.mem[S.index[k].ram].parts[p] = Spoilt(@, "ram")])
     \/ S.index[k].disk /\ Becomes(s, [S EXCEPT !.disk[k].bytes = Spoilt(@, "disk")])
  /\ faults' = [faults EXCEPT !.flips = @ + 1]
  /\ UNCHANGED <<hand, wr, copy, tgt, down>>

\* Somebody has found that out.
Condemn(s, k) ==
  LET S == store[s] ks == Doomed(S, k) IN
  /\ Spoiled(S, k)
  /\ Becomes(s, Dropped(S, ks))
  /\ wr' = Over(s, ks, wr)
  /\ UNCHANGED <<hand, copy, tgt, down, faults>>

\* kill -9, and a new process. The disk may have lost what it had not yet written, and may have copies that the books were
\* not told of yet; readers' copies are their own.
Left(S, lost, landed) ==
  [S EXCEPT !.disk = [k \in Key |-> IF k \in lost THEN NoCopy ELSE IF k \in landed THEN Copied(S, k) ELSE S.disk[k]]]
Crash(s, lost, landed) ==
  /\ faults.crashes < MaxCrashes /\ faults' = [faults EXCEPT !.crashes = @ + 1]
  /\ \A k \in lost : store[s].index[k].disk
  /\ \A k \in landed : Moving(store[s], "spill", k)
  /\ Becomes(s, Restored(Left(store[s], lost, landed)))
  /\ hand' = [h \in Holder |-> [n \in Number |->
       IF hand[h][n].s = s /\ hand[h][n].st = "held" THEN [hand[h][n] EXCEPT !.st = "lapsed"] ELSE hand[h][n]]]
  /\ wr' = Over(s, Key, wr)
  /\ copy' = [h \in Holder |-> IF copy[h].s = s /\ copy[h].st = "copying" THEN NotReading ELSE copy[h]]
  /\ UNCHANGED <<tgt, down>>

-------------------------------------------------------------------------------
Init ==
  /\ store = [s \in Store |-> EmptyStore]
  /\ hand = [h \in Holder |-> [n \in Number |-> Unissued]]
  /\ wr = {}
  /\ copy = [h \in Holder |-> NotReading]
  /\ tgt \in Begins
  /\ down = {}
  /\ faults = [flips |-> 0, crashes |-> 0]

TargetNext(h) == Accept(h) \/ Reject(h) \/ \E k \in Key : Speculate(h, k)
Arrives == \E w \in wr, p \in Part : Writes(w, p)
ArrivesBad == \E w \in wr, p \in Part : Garbles(w, p)
Seals == \E w \in wr : Seal(w)
GivesUp == \E w \in wr : GiveUp(w)
WriterNext ==
  \/ Arrives \/ ArrivesBad \/ Seals \/ GivesUp
  \/ \E s \in Store, h \in Holder, k \in Key : Reserve(s, h, k)
  \/ \E s \in Store, k \in Key : Lapse(s, k)
Opens(t) == \E x \in Hand(t).at : Open(t, x)
ReadNext ==
  \/ \E t \in Token : Opens(t)
  \/ \E h \in Holder : Take(h) \/ Leave(h) \/ \E p \in Part : Copy(h, p)
ReaderNext ==
  \/ ReadNext
  \/ \E s \in Store, t \in Token, k \in Key : Lookup(s, t, k)
  \/ \E t \in Token : Release(t) \/ Expire(t)
EvictNext(s, k) == EvictRam(s, k) \/ EvictDisk(s, k)
EndsSpill(s, ok) == \E m \in store[s].moves : EndSpill(s, m, ok)
EndsPromote(s, ok) == \E m \in store[s].moves : EndPromote(s, m, ok)
TierNext(s) ==
  \/ \E k \in Key : Spill(s, k) \/ Promote(s, k)
  \/ \E ok \in BOOLEAN : EndsSpill(s, ok) \/ EndsPromote(s, ok)

Next ==
  \/ \E h \in Target : TargetNext(h) \/ Die(h)
  \/ WriterNext \/ ReaderNext
  \/ \E s \in Store : TierNext(s) \/ (\E lost, landed \in SUBSET Key : Crash(s, lost, landed)) \/ \E k \in Key : EvictNext(s, k) \/ Flip(s, k) \/ Condemn(s, k)

Spec == Init /\ [][Next]_vars

\* What happens by itself: time passes, copies end, who lives goes on.
FairStore(s) ==
  /\ \A k \in Key : WF_vars(Lapse(s, k))
  /\ \A k \in Key, gen \in 1..MaxGen :
       WF_vars(\E m \in store[s].moves : m.key = k /\ m.gen = gen /\ \E ok \in BOOLEAN : EndSpill(s, m, ok) \/ EndPromote(s, m, ok))
FairWriter(h) ==
  /\ \A s \in Store, k \in Key : WF_vars(Reserve(s, h, k))
  /\ WF_vars(\E w \in wr : w.who = h /\ \E p \in Part : Writes(w, p))
  /\ WF_vars(\E w \in wr : w.who = h /\ Seal(w))
  /\ WF_vars(\E w \in wr : w.who = h /\ GiveUp(w))
FairReader(h) ==
  WF_vars(\E p \in Part : Copy(h, p)) /\ WF_vars(Take(h)) /\ WF_vars(Leave(h))
LiveSpec ==
  /\ Spec
  /\ \A s \in Store : FairStore(s)
  /\ \A h \in Holder : FairWriter(h) /\ FairReader(h)
  /\ \A t \in Token : WF_vars(Expire(t))

-------------------------------------------------------------------------------
\* Types

IsContent(x) == x.of \in Key \cup {Root} /\ x.bad \in {"no", "wire", "ram", "disk"}
IsEntry(b) ==
  /\ b.st \in {"absent", "writing", "sealed"} /\ b.gen \in 0..MaxGen /\ b.who \in Holder \cup {"nobody"}
  /\ IsContent(b.sum) /\ b.ram \in Slot \cup {0} /\ b.disk \in BOOLEAN /\ b.refs \in 0..Cardinality(Token)
IsStore(S) ==
  /\ \A k \in Key : IsEntry(S.index[k]) /\ S.gens[k] \in 0..MaxGen /\ IsContent(S.disk[k].bytes)
  /\ \A c \in Slot : S.mem[c].gen \in 0..MaxGen /\ \A p \in Part : IsContent(S.mem[c].parts[p])
  /\ \A p \in S.pins : p.tok \in Token /\ p.key \in Key /\ p.gen \in 1..MaxGen
  /\ \A m \in S.moves : m.kind \in {"spill", "promote"} /\ m.key \in Key /\ m.slot \in Slot
TypeOK ==
  /\ \A s \in Store : IsStore(store[s])
  /\ \A t \in Token : Hand(t).st \in {"none", "held", "lapsed", "released"}
  /\ \A w \in wr : w.s \in Store /\ w.who \in Holder /\ w.key \in Key /\ w.live \in BOOLEAN
  /\ \A h \in Holder : copy[h].st \in {"none", "copying", "taken"}
  /\ \A h \in Target : tgt[h].tip \in Key \cup {Root} /\ tgt[h].ok \in 0..Len(tgt[h].tip)

-------------------------------------------------------------------------------
\* Safety, as in DESIGN.md section 7

\* What a reader takes are the bytes of the block that it asked for; what it has pinned is whole.
NoTornRead ==
  /\ \A h \in Holder : copy[h].st = "taken" => copy[h].parts = Whole(Bytes(copy[h].want))
  /\ \A s \in Store : \A p \in store[s].pins :
       store[s].index[p.key].gen = p.gen => Sealed(store[s], p.key)

\* The ancestors of a sealed block are sealed; a block that is written has a parent that is there.
PrefixClosedIn(S) == \A k \in Key :
  There(S, k) /\ Parent(k) # Root => IF Sealed(S, k) THEN Sealed(S, Parent(k)) ELSE There(S, Parent(k))
PrefixClosed == \A s \in Store : PrefixClosedIn(store[s])

\* What a token holds, whose time is not over, is there still; and what is mapped stands where it stood.
KeepsIn(S, t, x) ==
  /\ [tok |-> t, key |-> x.key, gen |-> x.gen] \in S.pins
  /\ \/ Sealed(S, x.key) /\ S.index[x.key].gen = x.gen
     \/ \E d \in S.dead : d.key = x.key /\ d.gen = x.gen
PinnedStays ==
  /\ \A t \in Token : Hand(t).st = "held" => \A x \in Hand(t).at : KeepsIn(store[Hand(t).s], t, x)
  /\ \A h \in Holder :
       LET x == copy[h] IN
       x.st = "copying" /\ Hand(x.tok).st = "held" =>
         store[x.s].mem[x.slot].key = x.key /\ store[x.s].mem[x.slot].gen = x.gen

\* What is stored is the KV of committed tokens.
NoSpeculativeSealed == \A s \in Store : \A k \in Key :
  Sealed(store[s], k) => k \in Committed /\ store[s].index[k].sum = Bytes(k)

\* A lease that is not over is the only one on its block, which is being written by its holder.
OneWriter == \A w \in wr : w.live =>
  /\ Leased(store[w.s], w) /\ store[w.s].index[w.key].who = w.who
  /\ ~\E v \in wr : v # w /\ v.live /\ v.s = w.s /\ v.key = w.key

\* Each place that is taken belongs to something; room is what all of them take.
Claims(S) ==
  {<<S.index[k].ram, k, S.index[k].gen>> : k \in {k \in Key : S.index[k].ram # 0}}
  \cup UNION {{<<c, d.key, d.gen>> : c \in d.places} : d \in S.dead}
  \cup {<<m.slot, m.key, m.gen>> : m \in Under(S, "promote", Key)}
ConservedIn(S) ==
  LET taken == {c \in Slot : S.mem[c].gen # 0} spills == Under(S, "spill", Key) IN
  /\ {<<c, S.mem[c].key, S.mem[c].gen>> : c \in taken} = Claims(S)
  /\ S.ram = Sum([c \in taken |-> S.mem[c].size], taken) /\ S.ram <= RamRoom
  /\ S.room = Sum([k \in Key |-> S.disk[k].size], Key) + Sum([m \in spills |-> m.size], spills)
               + Sum([d \in S.dead |-> d.room], S.dead)
  /\ S.room <= DiskRoom
  /\ \A k \in Key : (S.disk[k].gen # 0) = S.index[k].disk
BytesConserved == \A s \in Store : ConservedIn(store[s])

\* Nobody gets another tenant's bytes.
TenantsApart == \A h \in Holder :
  copy[h].st = "taken" => \A p \in Part : Tenant(copy[h].parts[p].of) = Tenant(copy[h].want)

\* What is found has bytes in RAM or on disk, and they are its own: good, or gone bad where they are.
Own(bytes, sum, where) == bytes.of = sum.of /\ bytes.bad \in where \cup {"no"}
IndexSoundAt(S, k) ==
  LET b == S.index[k] IN
  Sealed(S, k) =>
    /\ b.ram # 0 \/ b.disk
    /\ b.ram # 0 => S.mem[b.ram].key = k /\ S.mem[b.ram].gen = b.gen /\ \A p \in Part : Own(S.mem[b.ram].parts[p], b.sum, {"ram"})
    /\ b.disk => S.disk[k].gen = b.gen /\ S.disk[k].sum = b.sum /\ Own(S.disk[k].bytes, b.sum, {"ram", "disk"})
IndexSound == \A s \in Store : \A k \in Key : IndexSoundAt(store[s], k)

\* The store's counts of pins are those of its pins.
RefExactIn(S) ==
  /\ \A k \in Key : S.index[k].refs = Cardinality({p \in S.pins : p.key = k /\ p.gen = S.index[k].gen})
  /\ \A d \in S.dead : d.refs = Cardinality({p \in S.pins : p.key = d.key /\ p.gen = d.gen}) /\ d.refs > 0
RefExact == \A s \in Store : RefExactIn(store[s])

\* Whichever store shows a block, and whoever brought it: it is that block, and all of it.
TransferAtomic == \A s \in Store : \A k \in Key :
  LET S == store[s] b == S.index[k] IN
  Sealed(S, k) => b.sum = Bytes(k) /\ (b.ram # 0 => \A p \in Part : S.mem[b.ram].parts[p].of = k)

\* Of what was rejected a target keeps nothing.
RollbackComplete == \A h \in Target :
  Len(tgt[h].kv) = Len(tgt[h].tip) /\ \A d \in 1..Len(tgt[h].kv) : tgt[h].kv[d] = Upto(tgt[h].tip, d)

\* A generation is used once.
GenMonotone == [][\A s \in Store : \A k \in Key :
  /\ store'[s].gens[k] >= store[s].gens[k]
  /\ Writing(store'[s], k) /\ ~(Writing(store[s], k) /\ store[s].index[k].gen = store'[s].index[k].gen)
       => store'[s].index[k].gen > store[s].gens[k]]_vars

-------------------------------------------------------------------------------
\* Liveness

\* Bytes that nobody can reach any more make room.
Unreachable(c) == \E s \in Store :
  \/ \E d \in store[s].dead : c \in d.places
  \/ \E k \in Key : Writing(store[s], k) /\ store[s].index[k].ram = c /\ store[s].index[k].who \in down
Reclaimed == \A c \in Slot : Unreachable(c) ~> ~Unreachable(c)

\* Who dies with a lease keeps nobody from writing the block.
NobodyBlocked == \A h \in Target : \A k \in Key :
  (k = Upto(tgt[h].tip, Len(k)) /\ Len(k) <= tgt[h].ok) ~> (h \in down \/ \E s \in Store : Sealed(store[s], k))

\* A copy between tiers ends.
MovesEnd == \A s \in Store : \A k \in Key :
  (\E m \in store[s].moves : m.key = k) ~> (~\E m \in store[s].moves : m.key = k)

\* So does one between stores: the block is there, or the peer has let it be.
TransfersEnd == \A h \in Peer : (copy[h].st # "none") ~> (copy[h].st = "none")

-------------------------------------------------------------------------------
\* Witnesses: states that must be reachable. Each is checked as an invariant and must be violated.

Entries == {store[s].index[k] : s \in Store, k \in Key}
\* Two holders have pinned one block that is not the first of its chain.
NeverShared == ~\E s \in Store : \E k \in Key : Parent(k) # Root /\ store[s].index[k].refs > 1
\* A block is sealed anew after it was dropped.
NeverAgain == ~\E b \in Entries : b.st = "sealed" /\ b.gen = MaxGen /\ MaxGen > 1
\* A holder has the same block pinned by two tokens.
NeverTwice == ~\E s \in Store : \E p, q \in store[s].pins : p.tok # q.tok /\ p.key = q.key /\ Owner(p.tok) = Owner(q.tok)
\* A lease is over, and another holder has written the block.
NeverOvertaken == ~\E w \in wr : ~w.live /\ \E s \in Store : s = w.s /\ Sealed(store[s], w.key) /\ store[s].gens[w.key] > w.gen
\* Both branches of a fork stand.
NeverForked == ~\E s \in Store : \E j, k \in Key : j # k /\ Parent(j) = Parent(k) /\ Sealed(store[s], j) /\ Sealed(store[s], k)
\* The whole of every chain stands.
NeverFull == ~\A s \in Store : \A k \in Key : Sealed(store[s], k)
\* A store has come back with blocks.
NeverRestored == ~(faults.crashes > 0 /\ \E b \in Entries : b.st = "sealed" /\ b.disk)
\* A block went to disk, came back, and was taken by a reader.
NeverPromoted == ~\E h \in Holder :
  LET x == copy[h] IN x.st = "taken" /\ x.s # "nowhere" /\ store[x.s].index[x.key].disk /\ faults.crashes > 0
\* Bytes were found to be bad while a reader had them pinned.
NeverCondemned == ~\E s \in Store : store[s].dead # {}
\* A copy comes too late.
NeverLate == ~\E s \in Store : \E m \in store[s].moves : ~Current(store[s], m)
\* A reader meets bytes that are not those it was told of, and leaves them.
NeverMissed == ~\E h \in Holder :
  copy[h].st = "copying" /\ (\A p \in Part : copy[h].parts[p] # Nothing) /\ ~Checks(copy[h])
\* Tokens were rejected, others accepted in their place, and those are stored.
NeverRejected == ~\E s \in Store : \E h \in Target : \E k \in Key :
  tgt[h].rej /\ Sealed(store[s], k) /\ Parent(k) # Root /\ k = tgt[h].tip
\* A block is in two stores.
NeverTransferred == ~\E s, d \in Store : s # d /\ \E k \in Key : Sealed(store[s], k) /\ Sealed(store[d], k)
\* Two tenants have read their own.
NeverApart == ~\E g, h \in Holder :
  copy[g].st = "taken" /\ copy[h].st = "taken" /\ Tenant(copy[g].want) # Tenant(copy[h].want)
\* Falls only if there is a fair behaviour at all.
NeverFair == <>[](~\E b \in Entries : b.st = "sealed")
===============================================================================
