/* The convergence protocol, from docs/protocol.md and not from handfast's sources: an independent
 * statement of the same rules, for an independent checker.
 *
 * N domains hold one shard each in one tier. An epoch is a generation 1..G and a step 1..S, packed as
 * EP(g, s); 0 is genesis. What is durable or was ever sent is global; what a member has heard is its
 * own, and a crash takes it. What a peer says is heard as it stands when it is heard: of a kind of facts
 * all at once, at any time, any number of times, or never. So messages may be lost, doubled and late;
 * words of an older generation or incarnation that arrive behind newer ones are not in it, nor what is
 * held eventually, nor that a vote is cast once. A fault is planted by -DMUTANT_...
 */
#ifndef N
#define N 2
#endif
#ifndef G
#define G 2
#endif
#ifndef S
#define S 2
#endif
#ifndef CRASHES
#define CRASHES 1
#endif
#ifndef ROTS
#define ROTS 0
#endif
#ifndef WINDOW
#define WINDOW 2
#endif

#define EPOCHS (1 + (G) * (S))
#define EP(g, s) (1 + ((g) - 1) * (S) + (s) - 1)
#define GEN(e) ((e) == 0 -> 0 : 1 + ((e) - 1) / (S))
#define STEP(e) ((e) == 0 -> 0 : 1 + ((e) - 1) % (S))
#define BIT(e) (1 << (e))
#define HAS(mask, e) (((mask) >> (e)) & 1)
#define ALL ((1 << (N)) - 1)
#define AT(g, i) ((g) * (N) + (i))

/* What must be reached somewhere: that it is not is asserted, to be violated. */
#ifdef GOAL_A_SECOND_START_CONVERGES
#define GOAL (HAS(converged, EP(2, 1)))
#endif
#ifdef GOAL_BOTH_EPOCHS_ARE_KNOWN_BY_BOTH
#define GOAL (line[0] == EP(1, 2) && line[1] == EP(1, 2))
#endif
#ifdef GOAL_A_START_GOES_ON
#define GOAL (base[2] == 1 + EP(1, 1))
#endif
#ifdef GOAL_A_START_DESCENDS_BELOW_A_BAD_COPY
#define GOAL (HAS(converged & rotten[0], EP(1, 1)) && base[2] == 1)
#endif
#ifdef GOAL_A_TIMELINE_IS_ABANDONED
#define GOAL (HAS(converged, EP(1, 2)) && base[2] == 1 + EP(1, 1) && want[2] == 1)
#endif
#ifndef GOAL
#define GOAL (false)
#endif

/* Durable, by domain. */
short retained[N];
short voted[N];          /* STAGED, write-once */
short images[N];         /* durable bytes, voted on or not */
short rotten[N];
byte frozen[N];          /* the highest generation frozen */
byte held[N];            /* the highest generation whose restore certificate is held */
byte line[N];            /* the epoch known converged */

/* Facts of a generation: durable where they are said, and sent. */
short report[(G + 1) * N];     /* what was retained at FREEZE; -1 before it */
byte reported[(G + 1) * N];    /* the highest restore certificate at FREEZE */
short valid[(G + 1) * N];
short bad[(G + 1) * N];
byte accepted[(G + 1) * N];    /* 1 + epoch */
byte base[G + 1];              /* 1 + epoch, of the restore certificate */
byte want[G + 1];              /* a step that the launch asks for; 0: the newest */
byte launched;

/* Heard, of the generation frozen; volatile. */
byte heard_report[N];          /* mask of members */
short heard_valid[N * N];
short heard_bad[N * N];
byte heard_accepted[N];
short heard_voted[N * N];
byte persisting[N];
bool acts[N];                  /* a rank trains on the certificate held */
byte step[N];

short converged;               /* every epoch that somebody ever knew converged */
byte crashes[N];
byte rots;

/* Whether epoch e lies on the chain of bases of generation g. */
inline eligible(e, g, yes) {
	top_ = g; cap_ = EPOCHS; yes = 2;
	do
	:: yes == 2 && top_ == 0 -> yes = ((e) == 0 && (cap_ == EPOCHS || cap_ == 0))
	:: yes == 2 && top_ != 0 && GEN(e) == top_ -> yes = (cap_ == EPOCHS || (e) <= cap_)
	:: yes == 2 && top_ != 0 && GEN(e) != top_ -> cap_ = base[top_] - 1; top_ = GEN(cap_)
	:: yes != 2 -> break
	od
}

/* The highest restore certificate that any member reports for generation g. */
inline highest(g) {
	high_ = 0; j_ = 0;
	do
	:: j_ < N ->
		if
		:: reported[AT(g, j_)] > high_ -> high_ = reported[AT(g, j_)]
		:: else
		fi;
		j_++
	:: else -> break
	od
#ifdef MUTANT_IGNORES_OTHERS_CERTIFICATES
	; high_ = reported[AT(g, 0)]
#endif
}

/* The candidate of member i: 1 + epoch, or 0 where there is none. */
inline candidate(i) {
	g_ = frozen[i]; highest(g_); found_ = 0; e_ = EPOCHS;
	do
	:: e_ > 0 && found_ == 0 ->
		e_--; ok_ = 1; j_ = 0;
		do
		:: j_ < N ->
			if
			:: !HAS(report[AT(g_, j_)], e_) -> ok_ = 0
			:: HAS(heard_bad[i * N + j_], e_) -> ok_ = 0
			:: else
			fi;
			j_++
		:: else -> break
		od;
		if
		:: ok_ && want[g_] != 0 && STEP(e_) != want[g_] -> ok_ = 0
		:: else
		fi;
		if
		:: ok_ ->
#ifdef MUTANT_OFFERS_ORPHANS
			is_ = 1;
#else
			eligible(e_, high_, is_);
#endif
			if
			:: is_ -> found_ = 1 + e_
			:: else
			fi
		:: else
		fi
	:: else -> break
	od
}

inline forget(i) {
	heard_report[i] = 0; heard_accepted[i] = 0; persisting[i] = 0;
	j_ = 0;
	do
	:: j_ < N ->
		heard_valid[i * N + j_] = 0; heard_bad[i * N + j_] = 0; heard_voted[i * N + j_] = 0;
		j_++
	:: else -> break
	od
}

/* What a member knows by itself once it is up: its own words. */
inline own_words(i) {
	if
	:: frozen[i] > 0 ->
		heard_report[i] = 1 << i;
		heard_valid[i * N + i] = valid[AT(frozen[i], i)];
		heard_bad[i * N + i] = bad[AT(frozen[i], i)];
		heard_accepted[i] = (accepted[AT(frozen[i], i)] > 0) << i;
		heard_voted[i * N + i] = voted[i]
	:: else
	fi
}

/* S3: something living is retained by all; S4: what is known converged and lives is not lost. */
inline judge_retained() {
	top2_ = 0; j_ = 0;
	do
	:: j_ < N -> top2_ = (held[j_] > top2_ -> held[j_] : top2_); j_++
	:: else -> break
	od;
	common_ = (1 << EPOCHS) - 1; j_ = 0;
	do
	:: j_ < N -> common_ = common_ & retained[j_]; j_++
	:: else -> break
	od;
	lives_ = 0; e_ = 0;
	do
	:: e_ < EPOCHS ->
		if
		:: HAS(common_, e_) -> eligible(e_, top2_, is_); lives_ = lives_ | is_
		:: else
		fi;
		e_++
	:: else -> break
	od;
	assert(lives_)
}

/* At a restore to epoch c in generation g: no orphan, and nothing converged is stepped below. */
inline judge_restored(c, g) {
	highest(g); high2_ = high_; top2_ = 0; j_ = 0;
	do
	:: j_ < N ->
		if
		:: held[j_] < g && held[j_] > top2_ -> top2_ = held[j_]
		:: else
		fi;
		j_++
	:: else -> break
	od;
	eligible(c, top2_, is_);
	assert(is_);                                   /* S12: no orphan of an abandoned timeline */
	j_ = 0;
	do
	:: j_ < N ->
		assert(HAS(valid[AT(g, j_)], c));          /* S11: validated by all ... */
		assert(accepted[AT(g, j_)] == 1 + (c));    /* ... and accepted by all */
		j_++
	:: else -> break
	od;
	e_ = (c) + 1;
	do
	:: e_ < EPOCHS && want[g] == 0 ->
		if
		:: HAS(converged, e_) ->
			eligible(e_, top2_, is_); ok_ = 0; j_ = 0;
			do
			:: j_ < N -> ok_ = ok_ | HAS(rotten[j_], e_); j_++
			:: else -> break
			od;
			assert(!is_ || ok_)                    /* S4 */
		:: else
		fi;
		e_++
	:: else -> break
	od
}

inline resume(i, c) {
	held[i] = frozen[i]; line[i] = c; converged = converged | BIT(c)
}

proctype Engine() {
	byte w;
	do
	:: atomic { launched < G ->
		launched++;
		if
		:: want[launched] = 0
		:: launched > 1 -> select(w : 1 .. S); want[launched] = w
		fi;
		w = 0
	}
	od
}

proctype Domain(byte i) {
	byte j_, g_, e_, ok_, is_, found_, high_, high2_, top_, cap_, top2_, lives_, open_;
	short common_;
	do
	/* A round reaches this member: FREEZE, unless it has frozen a later one. */
	:: d_step { launched > frozen[i] ->
		frozen[i] = launched;
		report[AT(frozen[i], i)] = retained[i];
		reported[AT(frozen[i], i)] = held[i];
#ifndef MUTANT_VOTES_AFTER_A_FREEZE
		acts[i] = 0;
		forget(i);
#else
		e_ = persisting[i]; acts[i] = 0; forget(i); persisting[i] = e_;
#endif
		own_words(i);
		j_ = 0; g_ = 0; e_ = 0; ok_ = 0; is_ = 0; top_ = 0; cap_ = 0
	}
	/* Hear one fact of the generation that was frozen. */
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && heard_report[i] != ALL ->
		j_ = 0;
		do
		:: j_ < N && (HAS(heard_report[i], j_) || report[AT(frozen[i], j_)] == -1) -> j_++
		:: else -> break
		od;
		if
		:: j_ < N -> heard_report[i] = heard_report[i] | (1 << j_)
		:: else
		fi;
		j_ = 0
	}
	:: atomic { frozen[i] > 0 && held[i] < frozen[i] && heard_report[i] == ALL ->
		select(j_ : 0 .. N - 1);
		if
		:: heard_valid[i * N + j_] = valid[AT(frozen[i], j_)]
		:: heard_bad[i * N + j_] = bad[AT(frozen[i], j_)]
		:: accepted[AT(frozen[i], j_)] > 0 -> heard_accepted[i] = heard_accepted[i] | (1 << j_)
		fi;
		j_ = 0
	}
	/* Judge the own copy of the candidate: every byte is read. */
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && heard_report[i] == ALL ->
		candidate(i);
		if
		:: found_ > 0 && !HAS(valid[AT(frozen[i], i)] | bad[AT(frozen[i], i)], found_ - 1) ->
			if
#ifndef MUTANT_CALLS_ANYTHING_VALID
			:: HAS(rotten[i], found_ - 1) ->
				bad[AT(frozen[i], i)] = bad[AT(frozen[i], i)] | BIT(found_ - 1)
#endif
			:: else ->
				assert(!HAS(rotten[i], found_ - 1));           /* S14 */
				valid[AT(frozen[i], i)] = valid[AT(frozen[i], i)] | BIT(found_ - 1)
			fi;
			own_words(i)
		:: else
		fi;
		j_ = 0; g_ = 0; e_ = 0; ok_ = 0; is_ = 0; found_ = 0; high_ = 0; top_ = 0; cap_ = 0
	}
	/* Accept: every shard has a valid copy, known here. */
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && heard_report[i] == ALL &&
			accepted[AT(frozen[i], i)] == 0 ->
		candidate(i); ok_ = (found_ > 0); j_ = 0;
		do
		:: j_ < N && ok_ ->
#ifndef MUTANT_ACCEPTS_UNVALIDATED
			ok_ = HAS(heard_valid[i * N + j_], found_ - 1);
#endif
			j_++
		:: else -> break
		od;
		if
		:: ok_ ->
			accepted[AT(frozen[i], i)] = found_; heard_accepted[i] = heard_accepted[i] | (1 << i)
		:: else
		fi;
		j_ = 0; g_ = 0; e_ = 0; ok_ = 0; is_ = 0; found_ = 0; high_ = 0; top_ = 0; cap_ = 0
	}
	/* The restore certificate: written by whoever knows that all have accepted. */
#ifdef MUTANT_RESTORES_ALONE
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && accepted[AT(frozen[i], i)] > 0 ->
#else
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && heard_accepted[i] == ALL ->
#endif
		found_ = accepted[AT(frozen[i], i)];
		assert(base[frozen[i]] == 0 || base[frozen[i]] == found_);     /* S6, S13 */
		if
		:: base[frozen[i]] == 0 -> judge_restored(found_ - 1, frozen[i])
		:: else                 /* written already, and then judged */
		fi;
		base[frozen[i]] = found_;
		assert(!(GOAL));
		resume(i, found_ - 1);
		j_ = 0; e_ = 0; ok_ = 0; is_ = 0; found_ = 0; high_ = 0; high2_ = 0;
		top_ = 0; cap_ = 0; top2_ = 0
	}
	:: d_step { frozen[i] > 0 && held[i] < frozen[i] && base[frozen[i]] > 0 ->
		resume(i, base[frozen[i]] - 1)
	}
	/* The rank acts once its certificate is durable. */
	:: d_step { frozen[i] > 0 && held[i] == frozen[i] && !acts[i] ->
		acts[i] = 1;
		step[i] = STEP(base[frozen[i]] - 1);
		e_ = EP(frozen[i], S);
		do  /* what this generation has staged already is not saved again */
		:: e_ >= EP(frozen[i], 1) && HAS(voted[i], e_) -> step[i] = (step[i] > STEP(e_) -> step[i] : STEP(e_)); break
		:: e_ >= EP(frozen[i], 1) && !HAS(voted[i], e_) -> e_--
		:: else -> break
		od;
		e_ = 0
	}
	/* Train a step, and hand over the image. The window bounds what has not converged. */
	:: d_step { acts[i] && held[i] == frozen[i] && persisting[i] == 0 && step[i] < S ->
		ok_ = 0; e_ = line[i] + 1;
		do
		:: e_ < EPOCHS -> ok_ = ok_ + (HAS(voted[i], e_) && GEN(e_) == frozen[i]); e_++
		:: else -> break
		od;
		if
		:: ok_ < WINDOW ->
			step[i]++; persisting[i] = EP(frozen[i], step[i]);
#ifdef MUTANT_VOTES_BEFORE_DURABLE
			voted[i] = voted[i] | BIT(persisting[i]);
			retained[i] = retained[i] | BIT(persisting[i])
#endif
		:: else
		fi;
		ok_ = 0; e_ = 0
	}
	/* The bytes are durable; the vote comes after, and may never. */
	:: d_step { persisting[i] != 0 && !HAS(images[i], persisting[i]) ->
		images[i] = images[i] | BIT(persisting[i])
	}
	:: d_step { persisting[i] != 0 && HAS(images[i], persisting[i]) ->
		assert(GEN(persisting[i]) == frozen[i]);                       /* S10 */
		voted[i] = voted[i] | BIT(persisting[i]);
		retained[i] = retained[i] | BIT(persisting[i]);
		heard_voted[i * N + i] = voted[i];
		persisting[i] = 0
	}
	/* Hear votes of this generation. */
	:: atomic { frozen[i] > 0 && held[i] == frozen[i] ->
		select(j_ : 0 .. N - 1);
		heard_voted[i * N + j_] = voted[j_];
		j_ = 0
	}
	/* Know that an epoch has converged: the greatest for which every vote is held. */
	:: d_step { frozen[i] > 0 && held[i] == frozen[i] ->
		e_ = EP(frozen[i], S); found_ = 0;
		do
		:: e_ >= EP(frozen[i], 1) && e_ > line[i] && found_ == 0 ->
			ok_ = 1; j_ = 0;
			do
			:: j_ < N -> ok_ = ok_ && HAS(heard_voted[i * N + j_], e_); j_++
			:: else -> break
			od;
#ifdef MUTANT_KNOWS_FROM_ITSELF
			ok_ = HAS(voted[i], e_);
#endif
			if
			:: ok_ -> found_ = e_
			:: else
			fi;
			e_--
		:: else -> break
		od;
		if
		:: found_ > 0 ->
			j_ = 0;
			do
			:: j_ < N ->
				assert(HAS(voted[j_], found_));                        /* S2 */
				assert(HAS(images[j_], found_));                       /* S1 */
				j_++
			:: else -> break
			od;
			line[i] = found_; converged = converged | BIT(found_);
			assert(!(GOAL))
		:: else
		fi;
		j_ = 0; e_ = 0; ok_ = 0; found_ = 0
	}
	/* Release what lies below the line, and what is no part of this timeline below it. */
#ifdef MUTANT_RELEASES_DURING_A_RECOVERY
	:: d_step { frozen[i] > 0 && line[i] > 0 && HAS(retained[i], line[i]) &&
#else
	:: d_step { frozen[i] > 0 && held[i] == frozen[i] && line[i] > 0 && HAS(retained[i], line[i]) &&
#endif
			(retained[i] & (BIT(line[i]) - 1)) != 0 ->
		retained[i] = retained[i] & ~(BIT(line[i]) - 1);
		judge_retained();
		j_ = 0; e_ = 0; is_ = 0; top_ = 0; cap_ = 0; top2_ = 0; lives_ = 0; common_ = 0
	}
#ifdef MUTANT_KEEPS_THE_LAST_ONE
	:: d_step { retained[i] != 0 && (retained[i] & (retained[i] - 1)) != 0 ->
		e_ = EPOCHS - 1;
		do
		:: !HAS(retained[i], e_) -> e_--
		:: else -> break
		od;
		retained[i] = BIT(e_);
		judge_retained();
		j_ = 0; e_ = 0; is_ = 0; top_ = 0; cap_ = 0; top2_ = 0; lives_ = 0; common_ = 0
	}
#endif
	/* Crash, and come back from what is durable. */
	:: d_step { crashes[i] < CRASHES ->
		crashes[i]++;
		acts[i] = 0; step[i] = 0;
		forget(i);
		own_words(i);
		j_ = 0
	}
	/* A copy that was attested goes bad. */
	:: atomic { rots < ROTS && (voted[i] & retained[i] & ~rotten[i]) != 0 ->
		select(e_ : 1 .. EPOCHS - 1);
		if
		:: HAS(voted[i] & retained[i] & ~rotten[i], e_) -> rots++; rotten[i] = rotten[i] | BIT(e_)
		:: else
		fi;
		e_ = 0
	}
	od
}

init {
	byte i;
	d_step {
		i = 0;
		do
		:: i < N -> retained[i] = 1; i++
		:: else -> break
		od;
		i = 0;
		do
		:: i < (G + 1) * N -> report[i] = -1; i++
		:: else -> break
		od;
		i = 0
	}
	atomic {
		run Engine();
		do
		:: i < N -> run Domain(i); i++
		:: else -> break
		od;
		i = 0
	}
}
