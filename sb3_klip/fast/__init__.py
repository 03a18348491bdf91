"""The same bits in less time, a module for each mechanism; and the compiled update, whose bits differ."""
