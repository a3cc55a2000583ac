------------------------------ MODULE TraceCommit ------------------------------
(* Whether a recorded run is a behaviour of Commit. TraceData, which is written  *)
(* for each run, holds what was recorded, in an order in which it can have       *)
(* happened: the log's records in theirs, and each other event behind the last   *)
(* record that its process had seen.                                             *)
(*                                                                               *)
(* What no process reports is taken as early as it can have happened: a session  *)
(* learns a record as soon as it is stored, for what it did before it knew the   *)
(* record stands before it; and what it may send, it has sent. So each state has *)
(* one successor, and the first event that has none is the one to look at.       *)
EXTENDS Commit, TraceData, TLC

VARIABLE at  \* the event to explain next

R == CHOOSE r \in Req : TRUE
Event == TraceLog[at]
Is(name) == at <= Len(TraceLog) /\ Event.ev = name /\ at' = at + 1
L == log[R]
W(s) == wk[R][s]

\* A process may work for an epoch more than once, one after another: TraceData says who does for which.
TraceEpoch(s) == SessionEpoch[s]

-------------------------------------------------------------------------------
\* What nobody reports

Learns(s) == W(s).st = "up" /\ W(s).known < Len(L)
Sends(s) == MayClose(W(s))
Reads == at <= Len(TraceLog) /\ Event.ev \in {"Delivered", "Finished"} /\ rd[R].at < Event.at
Ends(s) == at <= Len(TraceLog) /\ Event.ev = "Receipt" /\ Event.s = s /\ W(s).st = "up" /\ ~W(s).fin
Fails(s) ==
  /\ at <= Len(TraceLog) /\ Event.ev = "Closed" /\ ~Event.made /\ Event.s = s
  /\ W(s).st = "up" /\ W(s).pend = <<>> /\ W(s).fl = "none" /\ ~W(s).receipt.made

Quiet == /\ ~Reads
         /\ \A s \in Session : ~Learns(s) /\ ~Sends(s) /\ ~Ends(s) /\ ~Fails(s)

Hidden ==
  /\ UNCHANGED at
  /\ \/ Reads /\ Deliver(R)
     \/ \E s \in Session :
          \/ Learns(s) /\ (Acked(R, s) \/ Overtaken(R, s))
          \/ Sends(s) /\ Close(R, s)
          \/ Ends(s) /\ Finish(R, s)
          \/ Fails(s) /\ GiveUp(R, s)

-------------------------------------------------------------------------------
\* What is reported

\* A router's record: it read the log as it was, and its append was stored.
Routed(record) == MayFollow(L, record) /\ Stored(R, record)

TOpened == Is("Opened") /\ Routed(Opened)
TAssigned == Is("Assigned") /\ Event.e = NextEpoch(L) /\ Routed(Assigned(Event.e, Event.to))
TCancelled == Is("Cancelled") /\ Routed(Cancelled)
TExtended == Is("Extended") /\ \E m \in net :
  /\ IsExtended(m.rec) /\ m.rec.e = Event.e /\ m.rec.base = Event.base /\ m.rec.toks = Event.toks
  /\ Store(m)
TClosed == Is("Closed") /\ \E m \in net :
  /\ m.rec.k = "Closed" /\ m.rec.receipt.made = Event.made /\ m.rec.bill = Event.bill
  /\ m.rec.cancelled = Event.cancelled
  /\ Store(m)
\* A router closes what no target can.
TOrphaned ==
  /\ Is("Orphaned") /\ (Owner(L).to = "router" \/ Has(L, "Cancelled"))
  /\ Routed(Closed(NoReceipt, Event.bill, Event.cancelled))

TStarted == Is("Started") /\ Start(R, Event.s) /\ wk'[R][Event.s].known = Event.known
TSampled ==
  /\ Is("Sampled") /\ Len(Believed(W(Event.s))) = Event.base /\ W(Event.s).known = Event.known
  /\ Extend(R, Event.s, Event.toks)
TReceipt ==
  /\ Is("Receipt") /\ MakeReceipt(R, Event.s)
  /\ Len(ReceiptFor(W(Event.s)).toks) = Event.tokens /\ W(Event.s).cancelled = Event.cancelled

\* A client is served from a position on, which it says itself.
TFollowed ==
  /\ Is("Followed") /\ Event.position <= Len(Tokens(Upto(L, Event.at)))
  /\ cl' = [cl EXCEPT ![R] = Upto(Tokens(L), Event.position)]
  /\ ch' = [ch EXCEPT ![R] = <<>>]
  /\ rd' = [rd EXCEPT ![R] = Fresh(Event.position, 0)]
  /\ UNCHANGED <<log, net, wk, receipts, newest>>
TDelivered ==
  LET n == Len(Event.toks) IN
  /\ Is("Delivered") /\ Event.position = Len(cl[R]) /\ rd[R].at = Event.at
  /\ n <= Len(ch[R]) /\ Upto(ch[R], n) = Event.toks
  /\ cl' = [cl EXCEPT ![R] = @ \o Event.toks]
  /\ ch' = [ch EXCEPT ![R] = SubSeq(@, n + 1, Len(@))]
  /\ UNCHANGED <<log, net, wk, receipts, newest, rd>>
\* The client has been told that this is all.
TFinished ==
  /\ Is("Finished") /\ Has(L, "Closed") /\ Event.position = Len(cl[R]) /\ cl[R] = Tokens(L)
  /\ UNCHANGED vars

Reported ==
  \/ TOpened \/ TAssigned \/ TCancelled \/ TExtended \/ TClosed \/ TOrphaned
  \/ TStarted \/ TSampled \/ TReceipt \/ TFollowed \/ TDelivered \/ TFinished

TraceInit == Init /\ at = 1 /\ TLCSet(1, 0)
TraceNext == Hidden \/ (Quiet /\ Reported)
TraceSpec == TraceInit /\ [][TraceNext]_<<vars, at>>

\* A constraint, since it is then looked at in states that were reached, and not in those that were tried.
Progress == IF at - 1 > TLCGet(1) THEN TLCSet(1, at - 1) /\ PrintT(<<"explained", at - 1>>) ELSE TRUE

\* Each record was looked at when it was the last; so each is looked at once.
NewExactlyOnce == L # <<>> => ExactlyOnceAt(R, Len(L))
NewFenced == L # <<>> => FencedAt(R, Len(L))
NewOnlyVerified == L # <<>> => OnlyVerifiedAt(R, Len(L))
NewClosedIsFinal == L # <<>> => ClosedIsFinalAt(R, Len(L))
NewOneReceipt == L # <<>> => OneReceiptAt(R, Len(L))
NewBilledIsCommitted == L # <<>> => BilledIsCommittedAt(R, Len(L))

TraceSessions == 1..Len(SessionEpoch)
===============================================================================
