"""The cluster in virtual time: real routing, sides, transfer and schedulers over modelled links and steps."""
