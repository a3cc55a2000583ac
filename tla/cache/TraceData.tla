------------------------------- MODULE TraceData -------------------------------
(* Stands in for the recorded run, so that TraceCache can be read by itself.     *)
TraceLog == <<>>
ParentOf == <<>>
OnDisk == <<>>
Holders == 0
Lookups == 0
Slots == 0
===============================================================================
