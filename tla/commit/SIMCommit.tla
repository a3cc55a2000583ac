------------------------------ MODULE SIMCommit -------------------------------
(* Random behaviours of a model too big to go through: two requests, three      *)
(* epochs each, four tokens, clients that come back.                            *)
EXTENDS MCCommit

\* Left to chance alone a behaviour ends in crashes and cancels before anything was committed: they wait for tokens.
LateCancel(r) == Tokens(log[r]) # <<>> /\ \E n \in Read(r) : RouterAppends(r, n, Cancelled)
CrashesLate(r, s) == Tokens(log[r]) # <<>>
===============================================================================
