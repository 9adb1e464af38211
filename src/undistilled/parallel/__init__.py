"""One model over several processes: collectives, what ranks say to each other, and the driver that watches them."""
