-------------------------------- MODULE Mutants --------------------------------
(* Deliberate bugs. Each definition stands for one of Commit's, which a line in *)
(* manifest.toml replaces by it; a named property must then be violated.        *)
EXTENDS MCCommit

\* The stream ------------------------------------------------------------------

\* It stores whatever comes.
StoresAnything(m) == TRUE
ForgetsNothing(ms) == ms

\* It compares with its own last record instead of the subject's.
ComparesStream(m) == m.after = Len(log[m.r]) /\ (log[m.r] = <<>> \/ newest = m.r)

\* It keeps so many records of a subject and drops the oldest.
DropsOldest(l, record) == IF Len(l) = 4 THEN Append(Tail(l), record) ELSE Append(l, record)

\* Routers ---------------------------------------------------------------------

AppendsUnchecked(r, after, record) ==
  /\ log[r] # <<>> \/ record.k = "Opened"
  /\ UNCHANGED <<log, wk, receipts, newest, rd, ch, cl>>
  /\ Send(r, after, record)
SameEpoch(l) == IF Epoch(l) = 0 THEN 1 ELSE Epoch(l)

\* It closes a request that a target works on without taking it over first.
ClosesOwned(r) == \E n \in Read(r) :
  LET l == Upto(log[r], n) IN
  l # <<>> /\ RouterAppends(r, n, Closed(NoReceipt, Len(Tokens(l)), Has(l, "Cancelled")))

\* It bills what was asked for.
BillsAsked(r) == \E n \in Read(r) :
  LET l == Upto(log[r], n) IN
  Owner(l).to = "router" /\ AppendsUnchecked(r, n, Closed(NoReceipt, MaxLen, Has(l, "Cancelled")))

LooksAfterNone(r) == FALSE

\* Targets ---------------------------------------------------------------------

Rebased(w, by) == [i \in 1..Len(w.pend) |-> [w.pend[i] EXCEPT !.base = @ + by]]

\* Its ack was lost; it does not know its own record in the tail, and appends the tokens again behind it.
AppendsAgain(w) ==
  IF w.fl = "close" THEN [w EXCEPT !.known = @ + 1, !.st = "gone", !.fl = "none"]
  ELSE LET n == Len(Head(w.pend).toks) IN
       [w EXCEPT !.known = @ + 1, !.ctx = @ \o Head(w.pend).toks, !.pend = Rebased(w, n)]

\* Its ack was lost; it takes the append for stored and goes on with the next. (In Crash's place.)
Advances(r, s) ==
  LET w == wk[r][s] IN
  /\ w.st = "up" /\ w.fl = "pass"
  /\ Becomes(r, s, [AfterOwn(w) EXCEPT !.known = w.known])
  /\ UNCHANGED receipts

\* It goes on after a record that should stop it.
Ignores(w, record, kind) == IF record.k = kind THEN [w EXCEPT !.known = @ + 1] ELSE [w EXCEPT !.st = "gone", !.fl = "none"]
IgnoresCancelled(w, record) == Ignores(w, record, "Cancelled")
IgnoresAssigned(w, record) == Ignores(w, record, "Assigned")
IgnoresClosed(w, record) == Ignores(w, record, "Closed")

\* A process of the same name has extended in the same epoch; it takes the tokens for its own and appends its own too.
SharesEpoch(w, record) ==
  IF IsExtended(record)
  THEN [w EXCEPT !.known = @ + 1, !.ctx = @ \o record.toks, !.pend = Rebased(w, Len(record.toks))]
  ELSE [w EXCEPT !.st = "gone", !.fl = "none"]

\* A cancel comes between receipt and close; the receipt is used all the same.
ReusesReceipt(w, record) ==
  IF record.k = "Cancelled" THEN [w EXCEPT !.known = @ + 1, !.pend = <<>>, !.fl = "none", !.fin = TRUE, !.cancelled = TRUE]
  ELSE [w EXCEPT !.st = "gone", !.fl = "none"]

\* The newest pass is appended first.
LastFirst(w) ==
  IF w.fl = "pass" THEN Extended(w.e, w.pend[Len(w.pend)]) ELSE Closed(w.receipt, Len(w.ctx), w.cancelled)

\* A pass is sampled behind what is committed, and what is pending forgotten.
ForgetsPending(w) == w.ctx

\* Passes are appended by where they stand now, and those in between are lost.
LosesPass(w) ==
  IF w.fl = "pass" /\ Len(w.pend) > 1
  THEN Extended(w.e, [w.pend[Len(w.pend)] EXCEPT !.base = Len(w.ctx)])
  ELSE IF w.fl = "pass" THEN Extended(w.e, Head(w.pend)) ELSE Closed(w.receipt, Len(w.ctx), w.cancelled)

\* The receipt is made, and the log closed, while a pass is under way.
ReceiptsEarly(w) == w.st = "up" /\ w.fl = "pass" /\ ~w.receipt.made
ClosesEarly(w) == w.st = "up" /\ w.receipt.made
ReceiptOfSampled(w) == ReceiptOf(Believed(w), w.cancelled)

\* The receipt is named by the log and stored nowhere.
StoresNoReceipt(r, s) ==
  LET w == wk[r][s] IN
  /\ MayReceipt(w)
  /\ Becomes(r, s, [w EXCEPT !.receipt = ReceiptFor(w)])
  /\ UNCHANGED receipts

\* The receipt is over what the client has.
ReceiptOfClient(r, s) ==
  LET w == wk[r][s] x == ReceiptOf(cl[r], w.cancelled) IN
  /\ MayReceipt(w)
  /\ receipts' = [receipts EXCEPT ![r] = @ \cup {x}]
  /\ Becomes(r, s, [w EXCEPT !.receipt = x])

\* Routers and clients ---------------------------------------------------------

\* A record that the tail lost is never missed.
SkipsGaps(r) == rd[r].at + 1..Len(log[r])

\* A sampled token goes to the client before it is committed. (In Resume's place.)
StreamsEarly(r) == \E s \in Session :
  /\ wk[r][s].pend # <<>> /\ rd[r].seen = Len(wk[r][s].ctx)
  /\ rd' = [rd EXCEPT ![r].start = Len(Believed(wk[r][s]))]
  /\ ch' = [ch EXCEPT ![r] = @ \o Joined(wk[r][s].pend)]
  /\ UNCHANGED <<log, net, wk, receipts, newest, cl>>

FromTheStart(r) == 0

\* A router that takes a client over reads only what is new.
ReadsOnlyNew(r) == IF rd[r].n > 0 /\ rd[r].at = 0 THEN {} ELSE {rd[r].at + 1} \cap 1..Len(log[r])
===============================================================================
