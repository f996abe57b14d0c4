first = ()
