"""What performs a plan on one stage: executor, state, links, update. Takes explicit objects; reads no globals."""
