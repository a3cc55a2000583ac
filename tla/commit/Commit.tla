-------------------------------- MODULE Commit --------------------------------
(* The commit protocol: one log a request on a stream that appends only where  *)
(* the writer names the record it saw last. DESIGN.md section 4; the table at  *)
(* the end says which Python carries out which action.                         *)
EXTENDS Naturals, Sequences, FiniteSets

CONSTANTS
  Req,          \* requests
  Val,          \* token ids that a target may sample
  MaxLen,       \* tokens that are asked for
  MaxPass,      \* tokens of one pass of the target, at most
  MaxPending,   \* passes of a session that are not acknowledged, at most
  MaxEpoch,     \* epochs of a request
  Session,      \* takings-over of a request by a target, 1..n
  MaxResumes    \* how often a client's connection may break

VARIABLES
  log,      \* what the stream stores of each request: a sequence of records, its only truth
  net,      \* appends under way, of which each may arrive never, late or twice
  wk,       \* each session: a process of a target that works, or has worked, on the request
  receipts, \* receipts that stand in their own stream, whether or not a log names them
  newest,   \* the request of the stream's last record, if there is one
  rd,       \* what the router that serves the client has read, and passes on
  ch,       \* tokens between that router and the client, in order
  cl        \* tokens that the client has

vars == <<log, net, wk, receipts, newest, rd, ch, cl>>

-------------------------------------------------------------------------------
\* Records

NoReceipt == [toks |-> <<>>, cancelled |-> FALSE, made |-> FALSE]
ReceiptOf(toks, cancelled) == [toks |-> toks, cancelled |-> cancelled, made |-> TRUE]

Opened == [k |-> "Opened"]
Assigned(e, to) == [k |-> "Assigned", e |-> e, to |-> to]
\* pfx is no field of the record: it is what its writer had before it, for OnlyVerified to look at.
Extended(e, pass) == [k |-> "Extended", e |-> e, base |-> pass.base, toks |-> pass.toks, pfx |-> pass.pfx]
Cancelled == [k |-> "Cancelled"]
Closed(receipt, bill, cancelled) == [k |-> "Closed", receipt |-> receipt, bill |-> bill, cancelled |-> cancelled]

Upto(s, n) == SubSeq(s, 1, n)
IsPrefix(s, t) == Len(s) <= Len(t) /\ s = Upto(t, Len(s))
Min(a, b) == IF a < b THEN a ELSE b

Joined(parts) ==
  LET upto[i \in 0..Len(parts)] == IF i = 0 THEN <<>> ELSE upto[i - 1] \o parts[i].toks IN upto[Len(parts)]

IsExtended(record) == record.k = "Extended"
IsAssigned(record) == record.k = "Assigned"
Has(l, kind) == \E i \in 1..Len(l) : l[i].k = kind
Tokens(l) == Joined(SelectSeq(l, IsExtended))
\* The last Assigned; the epoch before the first is 0.
Owner(l) == LET all == SelectSeq(l, IsAssigned) IN IF all = <<>> THEN Assigned(0, "nobody") ELSE all[Len(all)]
Epoch(l) == Owner(l).e

\* LogState.check: whether a record may stand behind a log.
MayFollow(l, record) ==
  IF record.k = "Opened" THEN l = <<>>
  ELSE /\ l # <<>> /\ ~Has(l, "Closed")
       /\ Has(l, "Cancelled") => record.k = "Closed"
       /\ IsAssigned(record) => record.e = Epoch(l) + 1
       /\ IsExtended(record) => Epoch(l) > 0 /\ record.e = Epoch(l) /\ record.base = Len(Tokens(l))
       /\ record.k = "Closed" => record.cancelled = Has(l, "Cancelled") /\ record.bill = Len(Tokens(l))

-------------------------------------------------------------------------------
\* The stream

\* The compare-and-set.
MayStore(m) == m.after = Len(log[m.r])

\* An append that names a record behind the last can never be stored, since the log only grows: the state forgets it.
\* It makes no difference to what is stored, and many states one.
Alive(ms) == {m \in ms : m.after >= Len(log'[m.r])}

Sent(r, after, record) == [r |-> r, after |-> after, rec |-> record]

\* `log` stays: what is sent is added.
Send(r, after, record) == net' = Alive(net \cup {Sent(r, after, record)})

Appended(l, record) == Append(l, record)

Stored(r, record) ==
  /\ log' = [log EXCEPT ![r] = Appended(@, record)]
  /\ net' = Alive(net)
  /\ newest' = r
  /\ UNCHANGED <<wk, receipts, rd, ch, cl>>

Store(m) == m \in net /\ MayStore(m) /\ Stored(m.r, m.rec)
Stores == \E m \in net : Store(m)

-------------------------------------------------------------------------------
\* Routers. Any number of them: each reads the log, decides, appends, and reads again when that was refused.

\* A router may have read long ago, but what it then sends is refused: see Alive.
Read(r) == {Len(log[r])}

RouterAppends(r, after, record) ==
  /\ MayFollow(Upto(log[r], after), record)
  /\ UNCHANGED <<log, wk, receipts, newest, rd, ch, cl>>
  /\ Send(r, after, record)

Open(r) == \E n \in Read(r) : RouterAppends(r, n, Opened)

NextEpoch(l) == Epoch(l) + 1

Assign(r, to) == \E n \in Read(r) :
  LET l == Upto(log[r], n) IN Epoch(l) < MaxEpoch /\ RouterAppends(r, n, Assigned(NextEpoch(l), to))

Cancel(r) == \E n \in Read(r) : RouterAppends(r, n, Cancelled)

\* Where no target can: the router has taken it over itself, or it is cancelled and its target is gone.
CloseOrphan(r) == \E n \in Read(r) :
  LET l == Upto(log[r], n) cancelled == Has(l, "Cancelled") IN
  /\ Owner(l).to = "router" \/ cancelled
  /\ RouterAppends(r, n, Closed(NoReceipt, Len(Tokens(l)), cancelled))

-------------------------------------------------------------------------------
\* Targets. A process may stand still as long as it likes and go on in another time: that is the zombie.

Idle == [st |-> "idle", e |-> 0, known |-> 0, ctx |-> <<>>, pend |-> <<>>, fl |-> "none", fin |-> FALSE,
         cancelled |-> FALSE, receipt |-> NoReceipt]

\* The epoch that a session works in: the target that the router assigned it to starts it once.
EpochOf(s) == s

Start(r, s) ==
  /\ wk[r][s].st = "idle"
  /\ \E n \in 1..Len(log[r]) :
       LET l == Upto(log[r], n) IN
       /\ Epoch(l) = EpochOf(s) /\ Owner(l).to = "target" /\ ~Has(l, "Closed")
       /\ wk' = [wk EXCEPT ![r][s] =
            [Idle EXCEPT !.st = "up", !.e = Epoch(l), !.known = n, !.ctx = Tokens(l),
                         !.fin = Has(l, "Cancelled") \/ Len(Tokens(l)) = MaxLen, !.cancelled = Has(l, "Cancelled")]]
  /\ UNCHANGED <<log, net, receipts, newest, rd, ch, cl>>

\* All that the session has sampled; the next pass samples behind it.
Believed(w) == w.ctx \o Joined(w.pend)
InFlight(w) ==
  IF w.fl = "pass" THEN Extended(w.e, Head(w.pend))
  ELSE Closed(w.receipt, Len(w.ctx), w.cancelled)

\* The session is now w; what it has in flight, if anything, is on its way.
Becomes(r, s, w) ==
  /\ wk' = [wk EXCEPT ![r][s] = w]
  /\ UNCHANGED <<log, newest, rd, ch, cl>>
  /\ IF w.fl = "none" THEN net' = net ELSE Send(r, w.known, InFlight(w))

Passes(room) == UNION {[1..n -> Val] : n \in 1..Min(MaxPass, room)}

Extend(r, s, toks) ==
  LET w == wk[r][s] b == Believed(w)
      pass == [base |-> Len(b), toks |-> toks, pfx |-> b] IN
  /\ w.st = "up" /\ ~w.fin /\ Len(w.pend) < MaxPending
  /\ Becomes(r, s, [w EXCEPT !.pend = Append(@, pass), !.fl = "pass", !.fin = Len(b) + Len(toks) = MaxLen])
  /\ UNCHANGED receipts

Extends(r, s) == \E toks \in Passes(MaxLen - Len(Believed(wk[r][s]))) : Extend(r, s, toks)

\* A stop string, the end token, the deadline.
Finish(r, s) ==
  LET w == wk[r][s] IN
  /\ w.st = "up" /\ ~w.fin
  /\ Becomes(r, s, [w EXCEPT !.fin = TRUE])
  /\ UNCHANGED receipts

\* Its append in flight is stored, which it learns from the ack, or, when that is lost or the append refused, by reading.
AfterOwn(w) ==
  IF w.fl = "close" THEN [w EXCEPT !.known = @ + 1, !.st = "gone", !.fl = "none"]
  ELSE LET rest == Tail(w.pend) IN
       [w EXCEPT !.known = @ + 1, !.ctx = @ \o Head(w.pend).toks, !.pend = rest,
                 !.fl = IF rest = <<>> THEN "none" ELSE "pass"]

Acked(r, s) ==
  LET w == wk[r][s] IN
  /\ w.st = "up" /\ w.fl # "none" /\ w.known < Len(log[r]) /\ log[r][w.known + 1] = InFlight(w)
  /\ Becomes(r, s, AfterOwn(w))
  /\ UNCHANGED receipts

\* Somebody else's record follows the last one that it knew. A close that was overtaken by a cancel never was.
AfterOther(w, record) ==
  IF record.k = "Cancelled"
  THEN [w EXCEPT !.known = @ + 1, !.pend = <<>>, !.fl = "none", !.fin = TRUE, !.cancelled = TRUE, !.receipt = NoReceipt]
  ELSE [w EXCEPT !.known = @ + 1, !.st = "gone", !.pend = <<>>, !.fl = "none", !.receipt = NoReceipt]

Overtaken(r, s) ==
  LET w == wk[r][s] IN
  /\ w.st = "up" /\ w.known < Len(log[r])
  /\ ~(w.fl # "none" /\ log[r][w.known + 1] = InFlight(w))
  /\ Becomes(r, s, AfterOther(w, log[r][w.known + 1]))
  /\ UNCHANGED receipts

MayReceipt(w) == w.st = "up" /\ w.fin /\ w.pend = <<>> /\ w.fl = "none" /\ ~w.receipt.made
ReceiptFor(w) == ReceiptOf(w.ctx, w.cancelled)

MakeReceipt(r, s) ==
  LET w == wk[r][s] IN
  /\ MayReceipt(w)
  /\ receipts' = [receipts EXCEPT ![r] = @ \cup {ReceiptFor(w)}]
  /\ Becomes(r, s, [w EXCEPT !.receipt = ReceiptFor(w)])

MayClose(w) == w.st = "up" /\ w.fl = "none" /\ w.receipt.made

Close(r, s) ==
  LET w == wk[r][s] IN
  /\ MayClose(w)
  /\ Becomes(r, s, [w EXCEPT !.fl = "close"])
  /\ UNCHANGED receipts

\* No receipt can be made: the log is closed without one.
GiveUp(r, s) ==
  LET w == wk[r][s] IN
  /\ w.st = "up" /\ w.pend = <<>> /\ w.fl = "none" /\ ~w.receipt.made
  /\ Becomes(r, s, [w EXCEPT !.fl = "close", !.fin = TRUE])
  /\ UNCHANGED receipts

MayCrash(r, s) == TRUE

Crash(r, s) ==
  /\ wk[r][s].st = "up" /\ MayCrash(r, s)
  /\ wk' = [wk EXCEPT ![r][s] = [Idle EXCEPT !.st = "gone", !.e = wk[r][s].e]]
  /\ UNCHANGED <<log, net, receipts, newest, rd, ch, cl>>

-------------------------------------------------------------------------------
\* A router and its client

Fresh(start, n) == [at |-> 0, seen |-> 0, start |-> start, n |-> n]

\* Republished records may be lost or repeated: a reader takes the one that follows the last, and reads what it misses.
NextRecord(r) == {rd[r].at + 1} \cap 1..Len(log[r])

Deliver(r) == \E n \in NextRecord(r) :
  LET toks == IF IsExtended(log[r][n]) THEN log[r][n].toks ELSE <<>>
      had == Min(Len(toks), IF rd[r].start > rd[r].seen THEN rd[r].start - rd[r].seen ELSE 0) IN
  /\ rd' = [rd EXCEPT ![r].at = n, ![r].seen = @ + Len(toks)]
  /\ ch' = [ch EXCEPT ![r] = @ \o SubSeq(toks, had + 1, Len(toks))]
  /\ UNCHANGED <<log, net, wk, receipts, newest, cl>>

Receive(r) ==
  /\ ch[r] # <<>>
  /\ cl' = [cl EXCEPT ![r] = Append(@, Head(ch[r]))]
  /\ ch' = [ch EXCEPT ![r] = Tail(@)]
  /\ UNCHANGED <<log, net, wk, receipts, newest, rd>>

\* The router dies, or the connection does; the client asks any router to go on behind what it has.
Position(r) == Len(cl[r])
Resume(r) ==
  /\ rd[r].n < MaxResumes
  /\ rd' = [rd EXCEPT ![r] = Fresh(Position(r), rd[r].n + 1)]
  /\ ch' = [ch EXCEPT ![r] = <<>>]
  /\ UNCHANGED <<log, net, wk, receipts, newest, cl>>

-------------------------------------------------------------------------------
Init ==
  /\ log = [r \in Req |-> <<>>]
  /\ net = {}
  /\ wk = [r \in Req |-> [s \in Session |-> Idle]]
  /\ receipts = [r \in Req |-> {}]
  /\ newest = "nobody"
  /\ rd = [r \in Req |-> Fresh(0, 0)]
  /\ ch = [r \in Req |-> <<>>]
  /\ cl = [r \in Req |-> <<>>]

RouterNext(r) == Open(r) \/ Assign(r, "target") \/ Assign(r, "router") \/ Cancel(r) \/ CloseOrphan(r)
TargetNext(r, s) ==
  \/ Start(r, s) \/ Finish(r, s) \/ Acked(r, s) \/ Overtaken(r, s) \/ MakeReceipt(r, s) \/ Close(r, s)
  \/ GiveUp(r, s) \/ Crash(r, s)
  \/ Extends(r, s)
ClientNext(r) == Deliver(r) \/ Receive(r) \/ Resume(r)

Next ==
  \/ Stores
  \/ \E r \in Req : RouterNext(r) \/ ClientNext(r) \/ \E s \in Session : TargetNext(r, s)

Spec == Init /\ [][Next]_vars

\* A router looks after a request that no session works on. Where the last target lives (see MayCrash) every request ends.
Abandoned(r) == LET e == Epoch(log[r]) IN IF e = 0 THEN TRUE ELSE wk[r][e].st = "gone"
Rescue(r) == Abandoned(r) /\ Assign(r, "target")
Fair == \A r \in Req :
  /\ WF_vars(\E m \in net : m.r = r /\ Store(m))
  /\ WF_vars(Open(r)) /\ WF_vars(Rescue(r)) /\ WF_vars(CloseOrphan(r))
  /\ \A s \in Session :
       /\ WF_vars(Start(r, s)) /\ WF_vars(Extends(r, s)) /\ WF_vars(Acked(r, s)) /\ WF_vars(Overtaken(r, s))
       /\ WF_vars(MakeReceipt(r, s)) /\ WF_vars(Close(r, s))
FairClients == \A r \in Req : WF_vars(Deliver(r)) /\ WF_vars(Receive(r))
LiveSpec == Spec /\ Fair /\ FairClients
\* Where no client takes steps, it must not be fair to one: nothing would then be a behaviour, and anything hold.
LogSpec == Spec /\ Fair

-------------------------------------------------------------------------------
\* Types

TokenSeqs(n) == UNION {[1..k -> Val] : k \in 0..n}
IsReceipt(x) == x.toks \in TokenSeqs(MaxLen) /\ x.cancelled \in BOOLEAN /\ x.made \in BOOLEAN
IsRecord(x) ==
  CASE x.k \in {"Opened", "Cancelled"} -> TRUE
    [] x.k = "Assigned" -> x.e \in 1..MaxEpoch /\ x.to \in {"target", "router"}
    [] x.k = "Extended" -> x.e \in 1..MaxEpoch /\ x.base \in 0..MaxLen /\ x.toks \in TokenSeqs(MaxPass)
    [] x.k = "Closed" -> IsReceipt(x.receipt) /\ x.bill \in 0..MaxLen /\ x.cancelled \in BOOLEAN
TypeOK ==
  /\ \A r \in Req : \A i \in 1..Len(log[r]) : IsRecord(log[r][i])
  /\ \A m \in net : m.r \in Req /\ m.after \in Nat /\ IsRecord(m.rec)
  /\ \A r \in Req, s \in Session :
       LET w == wk[r][s] IN
       /\ w.st \in {"idle", "up", "gone"} /\ w.e \in 0..MaxEpoch /\ w.known <= Len(log[r])
       /\ w.ctx \in TokenSeqs(MaxLen) /\ w.fl \in {"none", "pass", "close"} /\ Len(w.pend) <= MaxPending
       /\ w.fin \in BOOLEAN /\ w.cancelled \in BOOLEAN /\ IsReceipt(w.receipt)
       /\ (w.fl = "pass") = (w.pend # <<>>)
  /\ \A r \in Req : \A x \in receipts[r] : IsReceipt(x) /\ x.made
  /\ newest \in Req \cup {"nobody"}
  /\ \A r \in Req : rd[r].at \in 0..Len(log[r]) /\ rd[r].n \in 0..MaxResumes
  /\ \A r \in Req : ch[r] \in TokenSeqs(MaxLen) /\ cl[r] \in TokenSeqs(MaxLen)

-------------------------------------------------------------------------------
\* Safety, as in DESIGN.md section 4

\* What any client saw, or is about to see, is a prefix of the log.
Agreement == \A r \in Req : IsPrefix(cl[r] \o ch[r], Tokens(log[r]))

\* Each position is committed once, in order: the Extended records tile the output.
ExactlyOnceAt(r, i) ==
  IsExtended(log[r][i]) => log[r][i].base = Len(Tokens(Upto(log[r], i - 1)))
ExactlyOnce == \A r \in Req : \A i \in 1..Len(log[r]) : ExactlyOnceAt(r, i)

\* Epochs go up one by one, and only the last assigned extends.
FencedAt(r, i) ==
  LET before == Epoch(Upto(log[r], i - 1)) IN
  /\ IsAssigned(log[r][i]) => log[r][i].e = before + 1
  /\ IsExtended(log[r][i]) => log[r][i].e = before
Fenced == \A r \in Req : \A i \in 1..Len(log[r]) : FencedAt(r, i)

\* Every committed token was sampled by a target behind the very tokens that stand before it.
OnlyVerifiedAt(r, i) ==
  IsExtended(log[r][i]) => log[r][i].pfx = Tokens(Upto(log[r], i - 1))
OnlyVerified == \A r \in Req : \A i \in 1..Len(log[r]) : OnlyVerifiedAt(r, i)

\* No token after Cancelled, nothing after Closed.
ClosedIsFinalAt(r, i) == \A j \in 1..i - 1 :
  /\ log[r][j].k # "Closed"
  /\ log[r][j].k = "Cancelled" => log[r][i].k = "Closed"
ClosedIsFinal == \A r \in Req : \A i \in 1..Len(log[r]) : ClosedIsFinalAt(r, i)

\* The receipt that the log names is over the log as it stands, and can be read.
OneReceiptAt(r, i) ==
  LET x == log[r][i] IN
  x.k = "Closed" /\ x.receipt.made =>
    /\ x.receipt.toks = Tokens(Upto(log[r], i)) /\ x.receipt.cancelled = x.cancelled
    /\ x.receipt \in receipts[r]
OneReceipt == \A r \in Req : \A i \in 1..Len(log[r]) : OneReceiptAt(r, i)

BilledIsCommittedAt(r, i) ==
  log[r][i].k = "Closed" => log[r][i].bill = Len(Tokens(Upto(log[r], i)))
BilledIsCommitted == \A r \in Req : \A i \in 1..Len(log[r]) : BilledIsCommittedAt(r, i)

\* What the stream has stored stays.
AppendOnly == [][\A r \in Req : IsPrefix(log[r], log'[r])]_vars

\* Every record may stand where it stands, so that no reader ever meets one that it must refuse.
Lawful == \A r \in Req : \A i \in 1..Len(log[r]) : MayFollow(Upto(log[r], i - 1), log[r][i])

\* What a session holds for committed is committed.
KnownIsCommitted == \A r \in Req, s \in Session :
  wk[r][s].st = "up" => wk[r][s].ctx = Tokens(Upto(log[r], wk[r][s].known))

-------------------------------------------------------------------------------
\* Liveness

EventuallyClosed == \A r \in Req : (log[r] # <<>>) ~> Has(log[r], "Closed")
Delivered == \A r \in Req : \A n \in 1..MaxLen : (Len(Tokens(log[r])) >= n) ~> (Len(cl[r]) >= n)

-------------------------------------------------------------------------------
\* Witnesses: states that must be reachable. Each is checked as an invariant and must be violated.

Full(r) == Has(log[r], "Closed") /\ Len(Tokens(log[r])) = MaxLen
\* The last epoch closes a whole answer, to which an earlier one gave its part.
NeverTakenOver == \A r \in Req :
  ~(Full(r) /\ Epoch(log[r]) = MaxEpoch /\ log[r][Len(log[r])].receipt.made
    /\ \E i \in 1..Len(log[r]) : IsExtended(log[r][i]) /\ log[r][i].e < MaxEpoch)
\* A cancel comes between tokens and a receipt is made of what was there.
NeverCancelledMidway == \A r \in Req :
  ~(Has(log[r], "Closed") /\ Has(log[r], "Cancelled") /\ Tokens(log[r]) # <<>> /\ log[r][Len(log[r])].receipt.made)
\* A router closes what no target could.
NeverOrphaned == \A r \in Req : ~(Has(log[r], "Closed") /\ ~log[r][Len(log[r])].receipt.made /\ Tokens(log[r]) # <<>>)
\* The client has everything, over as many connections as there may be.
NeverAllResumed == \A r \in Req : ~(rd[r].n = MaxResumes /\ Full(r) /\ cl[r] = Tokens(log[r]))
\* No fair behaviour ends: falls only if there is a fair behaviour at all.
NeverFair == \A r \in Req : <>[](~Has(log[r], "Closed"))
\* Two requests are answered side by side.
NeverTwo == Cardinality({r \in Req : Full(r)}) < 2
\* A session works on while another in the same epoch has committed.
NeverTwins == \A r \in Req : Cardinality({s \in Session : wk[r][s].st = "up"}) < 2
===============================================================================
