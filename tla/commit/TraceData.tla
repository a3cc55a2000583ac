------------------------------- MODULE TraceData -------------------------------
(* Stands in for the recorded run, so that TraceCommit can be read by itself.    *)
TraceLog == <<>>
SessionEpoch == <<>>
===============================================================================
