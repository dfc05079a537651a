"""The compiler: checkpoint in, artifact out. Needs the extra [compile]."""
