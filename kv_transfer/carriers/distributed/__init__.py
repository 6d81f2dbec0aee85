"""The dist carrier: frames go by torch.distributed from one worker's porter process to another's.

A worker's process imports no torch, so its porter is a child of its own. Here `porter`, `links`, `group` and `nccl` are
the child's half, which loads torch; `process`, `link_end`, `porters`, `service` and `carrier` are the worker's;
`records` and `pipe` are between.

A link's life, between the porters of one producer and one consumer:
1. the consumer's worker asks its porter to open one, and carries what the group's members say to each other about where
   they are over the authenticated RPC (`service.Meet`): no store listens on any port;
2. the members connect, and each shows by a MAC that it knows the token that only that RPC has told;
3. the producer's worker tells its porter which records to send, at a consumer's request. The consumer's porter has
   posted receives ahead, into slots of a ring that its worker has mapped; frames come in bursts, behind a head that
   names their pull. What nobody waits for any more is dropped, so a pull that was given up leaves nothing on the link;
4. the consumer says farewell, or one of the processes ends: the connection closes, and both porters forget the link.

Every operation has a deadline, and it is kept by the worker: a porter that does not answer, or does not end a send in
time, is killed and replaced, and its links are over. Whoever pulled over one of them goes on by another carrier.
"""
