------------------------------- MODULE MCCommit -------------------------------
(* Commit within bounds: what the .cfg files beside choose from.               *)
EXTENDS Commit, TLC

CONSTANTS a, b, r1, r2

Values == {a, b}
OneRequest == {r1}
OneValue == {a}
TwoRequests == {r1, r2}
Sessions1 == 1..1
Sessions2 == 1..2
Sessions3 == 1..3
Sessions4 == 1..4

\* Token values are alike, and so are requests.
Symmetry == Permutations(Val) \cup Permutations(Req)

\* Two processes in the first epoch, as when a router's Start comes twice.
TwinEpoch(s) == 1

\* Finitely many crashes.
LastLives(r, s) == s # MaxEpoch

\* Narrow profiles: the others' actions left out.
NoClient(r) == FALSE
NoSession(r, s) == FALSE
===============================================================================
